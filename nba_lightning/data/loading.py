"""Loaders whose order and augmentation are a function of a seed, on any number of processes, also when resumed."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.randomness import generator_for
from nba_lightning.data.dataset import Batches
from nba_lightning.data.sampler import BatchLoader, SeededSampler
from nba_lightning.io.batches import Batch

EVALUATION_BATCH = {"cpu": 128, "other": 512}
"""Images of a batch in evaluation where none is given: a CPU is two to three times slower per image at 512."""


def in_unit_range(images: Tensor) -> Tensor:
    """Images as float in [0, 1]: 8 bits are divided by 255, floats stay."""
    return images if images.is_floating_point() else images.float().div_(255)


def _identity(batch: Any) -> Any:
    return batch


class SeededLoading(pl.LightningDataModule):
    """Base class of our data modules.

    A subclass sets, in its constructor,

    Attributes:
        eval_batch_size: images per batch and process in evaluation; ``None`` for what suits the device.
        num_workers: worker processes for sets read from disk; sets in memory need none.
        order_seed: seed of the order and the augmentation in training.
    """

    eval_batch_size: int | None
    num_workers: int
    order_seed: int

    def _world(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, batches: Batches, batch_size: int, shuffle: bool) -> DataLoader[Any]:
        """Training batches in a new order each epoch, without an incomplete last one; or all in order."""
        rank, world_size = self._world()
        workers = 0 if batches.source.in_memory else self.num_workers
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "sampler": SeededSampler(batches, shuffle, self.order_seed, rank, world_size),
            "collate_fn": _identity,
            "drop_last": shuffle,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        stage: Literal["train", "evaluate"] = "train" if shuffle else "evaluate"
        return BatchLoader(batches, stage, self._batches_done if shuffle else None, **options)

    def _evaluation_loader(self, batches: Batches) -> DataLoader[Any]:
        """All of them in order."""
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        size = EVALUATION_BATCH["cpu" if on_cpu else "other"] if self.eval_batch_size is None else self.eval_batch_size
        return self._loader(batches, size, shuffle=False)

    def _batches_done(self) -> int:
        """Batches of this epoch that a fit which was interrupted had trained on."""
        loop = None if self.trainer is None else self.trainer.fit_loop
        return loop.epoch_loop.batch_progress.current.ready if loop is not None and loop.restarted_mid_epoch else 0

    def _converted(self, images: Tensor) -> Tensor:
        """In the Trainer's precision, last of all: Lightning converts before this hook, when images are `uint8`."""
        if self.trainer is None:
            return images
        converted: Tensor = self.trainer.precision_plugin.convert_input(images)
        return converted

    def _augmented(self, images: Tensor, augment: nn.Module | None, batch: Batch) -> Tensor:
        """Images of a training batch, uint8 or in [0, 1], as floats in [0, 1] that are augmented."""
        early = type(augment) is RandomCropFlip  # only moves values, so it does the same on a quarter of the memory
        images = images if early else in_unit_range(images)
        images = images if augment is None else augment(images, self._generator(3, batch))
        return in_unit_range(images)

    def _generator(self, key: int, batch: Batch) -> torch.Generator:
        return generator_for(self.order_seed, key, *batch.draw, device=batch.images.device)
