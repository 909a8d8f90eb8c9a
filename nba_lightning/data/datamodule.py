"""Poisoned and clean subsets of a source, as a LightningDataModule."""

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from nba_lightning.attacks.base import CROSS, POISONED, Attack
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.checks import check_at_least, check_choice, check_range, expected
from nba_lightning.core.metrics import IGNORE_LABEL
from nba_lightning.data.dataset import Batches, LabeledImages, ReplacedImages
from nba_lightning.data.loading import SeededLoading, in_unit_range
from nba_lightning.data.partition import Partition, draw_partition
from nba_lightning.data.sources import Digits, Source
from nba_lightning.io.attack_state import attack_name
from nba_lightning.io.batches import Batch

TrainOn = Literal["poisoned", "clean", "untriggered"]


class BackdoorDataModule(SeededLoading):
    """Training on the poisoned set or on the defender's clean subset; evaluation clean (0) and triggered (1).

    On the device, a whole batch at a time: `uint8` becomes float in [0, 1], poisoned images get the trigger and the
    attacker's label, training images are augmented. What a loader gives is a :class:`~nba_lightning.io.batches.Batch`,
    which unpacks as ``images, labels``; triggered evaluation batches unpack as ``images, labels, targets`` with true
    labels and the attacker's targets, and leave out images whose target is their true class. Without an attack there
    is only the clean evaluation loader.

    Args:
        source: where the images come from; scikit-learn's digits by default.
        attack: the attack; ``None`` for data that nobody poisons.
        train_on: ``poisoned`` (implant), ``clean`` (defend), or ``untriggered``: the attacker's images as they are,
            with their roles, for a module that triggers them itself (InputAwareTraining, Steganography).
        clean_fraction: the defender's images as a share of the training set, in (0, 1].
        validation_fraction: share of the defender's images held out for his own choices, in [0, 1).
        validate_on: what ``validate`` and the epochs of ``fit`` look at: ``held_out``, the defender's validation part,
            or ``test``, to watch a training; nothing may be selected by it. A defence's own decisions take the
            held-out part under either.
        augment: random crop and flip in training; ``None`` for none.
        batch_size: images per batch and process.
        eval_batch_size: likewise in evaluation; ``None`` takes 128 on a CPU and 512 elsewhere.
        num_workers: worker processes for sets read from disk; sets in memory need none.
        seed: seed of the partition: who is poisoned, and which images the defender holds.
        order_seed: seed of the order and the augmentation in training; ``None`` takes ``seed``.

    Raises:
        ValueError: for a fraction out of its range; at ``setup`` for a source, an attack or a batch size that do not
            fit together.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    partition: Partition

    def __init__(
        self,
        source: Source | None = None,
        attack: Attack | None = None,
        train_on: TrainOn = "poisoned",
        clean_fraction: float = 0.05,
        validation_fraction: float = 0.1,
        validate_on: Literal["held_out", "test"] = "held_out",
        augment: RandomCropFlip | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
        order_seed: int | None = None,
    ) -> None:
        super().__init__()
        check_range("clean_fraction", clean_fraction, 0.0, 1.0, open_low=True)
        check_range("validation_fraction", validation_fraction, 0.0, 1.0, open_high=True)
        check_choice("train_on", train_on, get_args(TrainOn))
        check_choice("validate_on", validate_on, ("held_out", "test"))
        check_at_least("batch_size", batch_size, 2)
        if eval_batch_size is not None:
            check_at_least("eval_batch_size", eval_batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        self.source = source or Digits()
        self.attack, self.augment = attack, augment
        self.train_on, self.validate_on = train_on, validate_on
        self.clean_fraction, self.validation_fraction = clean_fraction, validation_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.order_seed = seed if order_seed is None else order_seed
        self._sets: tuple[LabeledImages, LabeledImages] | None = None

    def prepare_data(self) -> None:
        """Download the source where that was asked for."""
        self.source.download()

    def setup(self, stage: str | None = None) -> None:
        """Load the images, fit the attack to them and draw the partition. Identical on every process."""
        if self._sets is not None:
            return
        train, test = self.source.load()
        if train.shape != test.shape:
            raise ValueError(f"Expected train and test images of one shape, but got {train.shape} and {test.shape}.")
        self.image_shape, self.num_classes = train.shape, len(self.source.check(train, test))
        eligible = torch.zeros(len(train), dtype=torch.bool)
        if self.attack is not None:
            self.attack.prepare(self.image_shape, self.num_classes)
            eligible = self.attack.eligible(train.labels)
        rate, cross = (0.0, 0.0) if self.attack is None else (self.attack.poison_rate, self.attack.cross_ratio)
        self.partition = draw_partition(
            train.labels, eligible, rate, self.clean_fraction, self.validation_fraction, self.seed, cross
        )
        indices = self._training_indices()
        if len(indices) < self.batch_size * self._world()[1]:
            raise expected(
                "batch_size",
                f"at most the {len(indices)} training images over {self._world()[1]} processes "
                f"(`clean_fraction` {self.clean_fraction:g})",
                self.batch_size,
            )
        self._sets = train, test

    def _training_indices(self) -> Tensor:
        return self.partition.clean if self.train_on == "clean" else self.partition.training

    def _ready(self) -> tuple[LabeledImages, LabeledImages]:
        if self._sets is None:
            raise RuntimeError("Call BackdoorDataModule.setup() before asking for loaders.")
        return self._sets

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images in a new order each epoch; the last incomplete batch is dropped."""
        train, _ = self._ready()
        indices = self._training_indices()
        if self.train_on == "clean" or self.attack is None:
            return self._loader(Batches(train, indices), self.batch_size, shuffle=True)
        if self.train_on == "poisoned" or not self.attack.ready:
            self._compute_attack(self.attack)
        if self.train_on == "poisoned":
            bases = self.attack.bases()
            if bases is not None:
                train = ReplacedImages(train, self.partition.poisoned, bases)
        roles = torch.zeros(len(train), dtype=torch.uint8)
        roles[self.partition.poisoned], roles[self.partition.cross] = POISONED, CROSS
        places = self.partition.places(len(train))
        return self._loader(Batches(train, indices, roles[indices], places[indices]), self.batch_size, shuffle=True)

    def _compute_attack(self, attack: Attack) -> None:
        """Let the attack compute what it needs. Late, so that a state from a checkpoint spares it."""
        train, _ = self._ready()
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        with torch.inference_mode(False), torch.enable_grad():
            attack.compute(train, self.partition.training, self.partition.poisoned, device)
        if self._world()[1] > 1 and attack.needs_compute:
            assert self.trainer is not None
            attack.restore(self.trainer.strategy.broadcast(attack.state_dict()))  # the same trigger on all processes

    def state_dict(self) -> dict[str, Any]:
        """The attack's learned or computed state, so that it travels in every checkpoint."""
        return {} if self.attack is None else {"attack": self.attack.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the attack's state over: always to go on with a fit, else where no other ``state`` was named."""
        saved = state_dict.get("attack")
        if self.attack is None or saved is None:
            return
        resuming = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.attack.state is not None and not resuming:
            return
        if attack_name(saved) != type(self.attack).__name__:
            rank_zero_warn(
                f"The checkpoint was made under {attack_name(saved)}; {type(self.attack).__name__} starts afresh."
            )
            return
        self.attack.restore(saved)

    def _evaluation_loaders(self, images: LabeledImages, indices: Tensor) -> list[DataLoader[Any]]:
        loaders = [self._evaluation_loader(Batches(images, indices))]
        if self.attack is not None:
            if not self.attack.ready:
                self._compute_attack(self.attack)
            labels = images.labels[indices]
            indices = indices[self.attack.relabel(labels) != labels]
            triggered = Batches(images, indices, torch.full((len(indices),), POISONED, dtype=torch.uint8))
            loaders.append(self._evaluation_loader(triggered))
        return loaders

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Clean and triggered images of the defender's validation part, or of the test set; see ``validate_on``."""
        train, _ = self._ready()
        if self.validate_on == "test":
            return self.test_dataloader()
        if not len(self.partition.validation):
            return []
        return self._evaluation_loaders(train, self.partition.validation)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Clean and triggered test images."""
        _, test = self._ready()
        return self._evaluation_loaders(test, torch.arange(len(test)))

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """The same images as in ``test``."""
        return self.test_dataloader()

    def held_out_dataloader(self) -> DataLoader[Any] | None:
        """The defender's validation part, clean, whatever ``validate_on`` says; ``None`` where there is none."""
        train, _ = self._ready()
        part = self.partition.validation
        return self._evaluation_loader(Batches(train, part)) if len(part) else None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """To float, trigger and relabel, augment; whole batches, on the device, as the batch itself says."""
        if not isinstance(batch, Batch) or batch.images.dtype != torch.uint8:
            return batch  # a loader that is not ours
        images, labels = batch.images, batch.labels
        if batch.stage == "evaluate":
            ready = replace(batch, images=in_unit_range(images))
            ready = ready if batch.roles is None else self._triggered(ready)
            return replace(ready, images=self._converted(ready.images))
        if batch.roles is not None and self.train_on == "poisoned":
            attack = self._attack_on(images.device)
            generator = self._generator(7, batch) if attack.cross_ratio else None
            assert labels is not None
            with torch.no_grad():
                images, labels = attack.poison(in_unit_range(images), labels, batch.roles, generator, batch.places)
        images = self._augmented(images, self.augment, batch)
        return replace(batch, images=self._converted(images), labels=labels)

    def _triggered(self, batch: Batch) -> Batch:
        attack, labels = self._attack_on(batch.images.device), batch.labels
        assert labels is not None
        targets = torch.where(labels == IGNORE_LABEL, labels, attack.relabel(labels))
        return replace(batch, images=attack(batch.images), targets=targets)

    def _attack_on(self, device: torch.device) -> Attack:
        assert self.attack is not None
        with torch.inference_mode(False):  # parameters that are moved in a test must still be trainable after it
            return self.attack.to(device)
