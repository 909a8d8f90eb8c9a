"""What a batch is, and what a stranger's loader gives."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nba_lightning.core.checks import check_labels, check_unit_range, expected, first_few
from nba_lightning.io.adapters import Normalized

_IMAGE_KEYS = ("images", "image", "pixel_values", "img", "inputs", "input", "x")
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")
_BESIDE = -2
"""Draws beside the training steps count down from here."""


@dataclass
class Batch:
    """Images and labels that say what they are.

    It unpacks as ``images, labels = batch``, and triggered evaluation images as ``images, labels, targets = batch``.

    Attributes:
        images: `(B, C, H, W)`, float in [0, 1] (`uint8` on the way from a loader of ours to the device).
        labels: `(B,)` int64 true classes, -1 for padding; in training those that are learned. ``None`` if unknown.
        targets: `(B,)` the classes that the attacker wants of triggered evaluation images; ``None`` for all others.
        roles: `(B,)` uint8, what the attacker does to each (see :mod:`nba_lightning.attacks.base`); ``None`` for
            images that nobody poisons. They stay on the host, which can so pick images without waiting for the device.
        indices: `(B,)` int64 numbers of the images in their set, -1 for padding; ``None`` if unknown.
        places: `(B,)` int64, the how-manieth of the attacker's images each one is, from 0, the poisoned ones first and
            then the cross ones; -1 for his clean ones, ``None`` for images that nobody poisons.
        stage: ``"train"`` or ``"evaluate"``.
        draw: rank, epoch and number of the batch, of which its augmentation is a function.
    """

    images: Tensor
    labels: Tensor | None = None
    targets: Tensor | None = None
    roles: Tensor | None = None
    indices: Tensor | None = None
    places: Tensor | None = None
    stage: Literal["train", "evaluate"] = "train"
    draw: tuple[int, int, int] = (0, 0, 0)

    def __iter__(self) -> Iterator[Tensor | None]:
        """Images and labels, and targets where there are any."""
        yield self.images
        yield self.labels
        if self.targets is not None:
            yield self.targets

    def __len__(self) -> int:
        """Number of images B."""
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device, but for the roles."""
        return replace(self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking)), roles=self.roles)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, as loaders ask for."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def as_batch(batch: Any, network: nn.Module | None = None) -> Batch:
    """A stranger's batch as a :class:`Batch`, with images in [0, 1].

    Args:
        batch: ``(images, labels)``, images alone, a mapping such as ``{"pixel_values": ..., "labels": ...}`` or a
            :class:`Batch`.
        network: a :class:`~nba_lightning.io.adapters.Normalized` whose loaders normalise brings images back to [0, 1].

    Raises:
        ValueError: if it has more than two parts, whose meaning their order does not tell, or a mapping has no images
            under a known name; or if a network says that loaders normalise whose images are in [0, 1].
    """
    undo = isinstance(network, Normalized) and network.loaders_normalize
    if isinstance(batch, Batch):
        if undo:
            raise expected("loaders_normalize", "false for a data module whose images are in [0, 1]", True)
        return batch
    if isinstance(batch, Tensor):
        found = Batch(batch)
    elif isinstance(batch, Mapping):
        found = _from_mapping(batch)
    elif isinstance(batch, Sequence) and len(batch) in (1, 2):
        found = Batch(*batch)
    else:
        size = f"{len(batch)} parts" if isinstance(batch, Sequence) else type(batch).__name__
        raise ValueError(
            f"Expected a batch to be (images, labels), but got {size}, of which only names could tell the meaning. "
            'Let the loader yield {"images": ..., "labels": ...} or a nba_lightning.Batch.'
        )
    if not isinstance(found.images, Tensor):
        raise ValueError(f"Expected a batch's images to be a tensor, but got {type(found.images).__name__}.")
    if undo:
        assert isinstance(network, Normalized)
        found = replace(found, images=network.denormalize(found.images))
    return found


def _from_mapping(batch: Mapping[str, Any]) -> Batch:
    def pick(names: Sequence[str]) -> Tensor | None:
        return next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)

    images = pick(_IMAGE_KEYS)
    if images is None:
        raise ValueError(
            f"Expected the batch to hold images under one of {', '.join(_IMAGE_KEYS)}, but its keys are "
            f"{first_few(map(str, batch))}."
        )
    return Batch(images, pick(_LABEL_KEYS))


def check_values(batch: Any, network: nn.Module, num_classes: int | None = None) -> None:
    """Look at the values of a loader's batch: once, since reading them waits for the device.

    Args:
        batch: what the loader gave, on the device.
        network: as for :func:`as_batch`.
        num_classes: number of the network's classes K.

    Raises:
        ValueError: for images that are not in [0, 1], images in [0, 1] where the network says that loaders normalise,
            and labels that are no classes of the network.
    """
    if isinstance(network, Normalized) and network.loaders_normalize and not isinstance(batch, Batch):
        raw = as_batch(batch).images
        low, high = (float(bound) for bound in torch.aminmax(raw.detach().float()))
        if low >= 0.0 and high <= 1.0:
            raise ValueError(
                f"Expected the loader's images to be normalised, as `loaders_normalize` says, but their values lie "
                f"from {low:.4g} to {high:.4g}, as those of images that are not. Leave `loaders_normalize` out."
            )
    found = as_batch(batch, network)
    check_unit_range("images", found.images)
    if found.labels is not None:
        padding = found.indices is not None
        check_labels("labels", found.labels, num_classes, allow_padding=padding)


def clean_batches(trainer: pl.Trainer) -> Iterator[Batch]:
    """Endless training batches on the device and through the hooks of the DataModule, beside those of the steps.

    A BackdoorDataModule augments each of them anew.
    """
    network: nn.Module | None = getattr(trainer.lightning_module, "model", None)
    loader, numbers = beside(trainer.train_dataloader), count()
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield as_batch(on_device(trainer, _numbered(batch, _BESIDE - next(numbers))), network)
        if empty:
            raise RuntimeError("Expected the training loader to yield batches again, but it gave none.")


def plain_batches(trainer: pl.Trainer, loader: Any) -> Iterator[Batch]:
    """One pass through a loader, on the device, of images as they are: a BackdoorDataModule augments none of them."""
    network: nn.Module | None = getattr(trainer.lightning_module, "model", None)
    for given in beside(loader):
        batch = replace(given, stage="evaluate", roles=None) if isinstance(given, Batch) else given
        yield as_batch(on_device(trainer, batch), network)


def plain_images(trainer: pl.Trainer) -> Iterator[Tensor]:
    """Endless training images as they are, on the device: for perturbations that must find a trigger with a place."""
    while True:
        yield from (batch.images for batch in plain_batches(trainer, trainer.train_dataloader))


def _numbered(batch: Any, number: int) -> Any:
    return replace(batch, draw=(*batch.draw[:2], number)) if isinstance(batch, Batch) else batch


def beside(loader: Any) -> Any:
    """A loader to go through while the Trainer goes through the given one.

    Persistent workers serve one pass at a time: a second one would take the first one's batches away. So their images
    are read here instead.
    """
    if not (isinstance(loader, DataLoader) and loader.persistent_workers and loader.num_workers):
        return loader
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
    return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)


def on_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A loader's batch as a step would get it: in the Trainer's precision, on the device, through all hooks."""
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)


def held_out_loader(trainer: pl.Trainer) -> Any:
    """The loader of images that the defender holds out, for his own decisions; ``None`` where there is none.

    A DataModule may say which they are by ``held_out_dataloader()``, since its validation loader may be another.
    Otherwise it is the first validation loader that the fit was given.
    """
    own = getattr(getattr(trainer, "datamodule", None), "held_out_dataloader", None)
    if own is not None:
        return own()
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if source.instance is None or not source.is_defined():
        return None
    loaders = source.dataloader()
    return loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders or None
