"""An owner's clean images: one folder with a subfolder for each class, all of it used, a part held out."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.checks import check_at_least, check_choice, check_range, expected
from nba_lightning.data.dataset import Batches, LabeledImages
from nba_lightning.data.disk import DiskImages
from nba_lightning.data.folder import Files, check_names
from nba_lightning.data.listing import listed
from nba_lightning.data.loading import SeededLoading, in_unit_range
from nba_lightning.data.partition import stratified_split
from nba_lightning.data.sources import in_memory_if_small
from nba_lightning.io.batches import Batch

_LEAST_TO_HOLD_OUT = 50
_MOST_TO_HOLD_OUT = 1000
_MODES: dict[int, Literal["RGB", "L"]] = {3: "RGB", 1: "L"}


def held_out_share(images: int) -> float:
    """The share to hold out where nobody says: a fifth, at most 1,000 images, and none of fewer than 50."""
    return 0.0 if images < _LEAST_TO_HOLD_OUT else min(0.2, _MOST_TO_HOLD_OUT / images)


def fitting_batch_size(images: int, processes: int = 1) -> int:
    """Images per batch and process where nobody says: 50 in all, of few images a quarter, so that an epoch has steps.

    Args:
        images: to train on.
        processes: that share them.
    """
    return max(2, min(50, images // 4) // processes)


class CleanImages(SeededLoading):
    """Clean images of an owner: ``root/<class>/*``, all used; a part of each class is held out for decisions.

    What a loader gives is a :class:`~nba_lightning.io.batches.Batch` with images in [0, 1] on the device. Training
    images are shifted and mirrored. Sets that are small decoded are held in memory, others read by workers. Hidden
    files and folders, and those of operating systems, are left out; what else is left out is said.

    Args:
        root: the folder.
        classes: names of the subfolders in the order of the model's outputs, also those without images; ``None`` for
            the order of torchvision's ``ImageFolder``, but for numbers (see
            :class:`~nba_lightning.data.folder.ImageFolderSource`).
        image_size: resize all images to this height and width; needed where sizes differ.
        channels: 3 for colour, 1 for grey.
        held_out: share of each class that is held out, in [0, 1); ``None`` for :func:`held_out_share`.
        batch_size: images per batch and process in training; ``None`` for :func:`fitting_batch_size`.
        eval_batch_size: likewise in evaluation; ``None`` takes 128 on a CPU and 512 elsewhere.
        max_images: of a larger folder as many are drawn, class by class.
        padding: largest shift in training, in pixels; ``None`` is an eighth of the height.
        flip: whether training mirrors images; letters, digits and signs should not be.
        memory_limit_mib: a set that decodes to more than this (MiB) is read from disk by workers.
        num_workers: worker processes for sets on disk.
        seed: of what is drawn, held out, and of the order and augmentation in training.

    Attributes:
        classes: names in the order of the class numbers, from ``setup`` on.
        num_classes: number of classes K.
        image_shape: `(C, H, W)`.
        training: `(N - M,)` indices of the images to train on.
        held_out: `(M,)` indices of those held out.

    Raises:
        ValueError: for an argument out of its range; at ``setup`` for a folder that is none or holds images of fewer
            than two classes, folders without a name, images that cannot be read or differ in size, by their path.
    """

    classes: list[str]
    num_classes: int
    image_shape: tuple[int, int, int]
    training: Tensor
    held_out: Tensor

    def __init__(
        self,
        root: str,
        classes: list[str] | None = None,
        image_size: int | None = None,
        channels: int = 3,
        held_out: float | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        max_images: int = 20_000,
        padding: int | None = None,
        flip: bool = True,
        memory_limit_mib: int = 2048,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("channels", str(channels), ("1", "3"))
        if classes is not None:
            check_names(classes)
        if held_out is not None:
            check_range("held_out", held_out, 0.0, 1.0, open_high=True)
        given = {"image_size": (image_size, 1), "batch_size": (batch_size, 2), "eval_batch_size": (eval_batch_size, 1)}
        given |= {"max_images": (max_images, 2), "memory_limit_mib": (memory_limit_mib, 0)}
        given |= {"num_workers": (num_workers, 0)}
        for name, (value, low) in given.items():
            if value is not None:
                check_at_least(name, value, low)
        self.root, self.given, self.image_size, self.channels = Path(root).expanduser(), classes, image_size, channels
        self.share, self.batch_size, self.eval_batch_size = held_out, batch_size, eval_batch_size
        self.max_images, self.memory_limit_mib, self.num_workers = max_images, memory_limit_mib, num_workers
        self.augment = RandomCropFlip(padding, flip)
        self.seed = self.order_seed = seed
        self._set: LabeledImages | None = None

    def setup(self, stage: str | None = None) -> None:
        """List the images, draw what is held out, read the images if they are few. Identical on every process."""
        if self._set is not None:
            return
        self.classes, paths, labels = listed(self.root, self.given)
        self.num_classes = len(self.classes)
        text = "\n".join([*self.classes, *(f"{path} {(self.root / path).stat().st_size}" for path in paths)])
        self._fingerprint = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        if len(paths) > self.max_images:
            kept = stratified_split(labels, 1 - self.max_images / len(paths), self.seed)[0]
            rank_zero_warn(
                f"Of the {len(paths):,} images in {str(self.root)!r} {len(kept):,} are used, drawn class by class with "
                f"seed {self.seed} (`max_images` is {self.max_images:,})."
            )
            paths, labels = [paths[index] for index in kept.tolist()], labels[kept]
        size = None if self.image_size is None else (self.image_size, self.image_size)
        disk = DiskImages(Files(self.root, paths, _MODES[self.channels]), labels, size, paths)
        share = held_out_share(len(paths)) if self.share is None else self.share
        self.training, self.held_out = stratified_split(labels, share, self.seed)
        self.batch_size_for(self._world()[1])
        self._set, self.image_shape = in_memory_if_small(disk, self.memory_limit_mib), disk.shape
        self._say(len(torch.unique(labels)))

    def name_further_classes(self, num_classes: int) -> list[str]:
        """Give names to the classes of a network that has more than the folder, which are taken to come last.

        Args:
            num_classes: K of the network.

        Returns:
            The names that were added.

        Raises:
            ValueError: if the network has fewer classes than the folder, or the order of classes was not given.
        """
        more = [f"class {label}" for label in range(len(self.classes), num_classes)]
        if num_classes < len(self.classes) or (more and self.given is None):
            raise expected(
                "classes",
                f"the names of the network's {num_classes} classes in its order",
                f"{len(self.classes)} {'names' if self.given is not None else 'folders without an order'}",
            )
        self.classes, self.num_classes = [*self.classes, *more], num_classes
        return more

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes and of the order of classes, to tell whether images are the same."""
        self.setup()
        return self._fingerprint

    def batch_size_for(self, processes: int) -> int:
        """Images per batch and process: what was given, else what fits.

        Args:
            processes: that share the images.

        Raises:
            ValueError: if there are too few images.
        """
        size = self.batch_size or fitting_batch_size(len(self.training), processes)
        if len(self.training) < size * processes:
            raise expected(
                "batch_size", f"at most the {len(self.training)} training images over {processes} processes", size
            )
        return size

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images in a new order each epoch; the last incomplete batch is dropped."""
        images = Batches(self._ready(), self.training)
        return self._loader(images, self.batch_size_for(self._world()[1]), shuffle=True)

    def held_out_dataloader(self) -> DataLoader[Any] | None:
        """The part that is held out; ``None`` where there is none."""
        return self._evaluation(self.held_out) if len(self.held_out) else None

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The part that is held out, if there is one."""
        return [self._evaluation(self.held_out)] if len(self.held_out) else []

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Any]:
        """All images, those of the training too, in their order."""
        return self._evaluation(torch.arange(len(self._ready())))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """To float in [0, 1]; training images are augmented. Whole batches, on the device."""
        if not isinstance(batch, Batch) or batch.images.dtype != torch.uint8:
            return batch  # a loader that is not ours
        train = batch.stage == "train"
        images = self._augmented(batch.images, self.augment, batch) if train else in_unit_range(batch.images)
        return replace(batch, images=self._converted(images))

    def images_at(self, indices: Tensor) -> Batch:
        """Images `(B, C, H, W)`, uint8, and labels at indices `(B,)`."""
        return Batches(self._ready(), indices).__getitems__(list(range(len(indices))))

    def _evaluation(self, indices: Tensor) -> DataLoader[Any]:
        return self._evaluation_loader(Batches(self._ready(), indices))

    def _ready(self) -> LabeledImages:
        if self._set is None:
            raise RuntimeError("Call CleanImages.setup() before asking for loaders.")
        return self._set

    def _say(self, classes: int) -> None:
        train, held_out = len(self.training), len(self.held_out)
        said = f"{train + held_out:,} clean images of {classes} classes: {train:,} to train on, {held_out:,} held out"
        if held_out:
            error = 100 * (0.9 * 0.1 / held_out) ** 0.5
            rank_zero_info(f"{said}, on which an accuracy of 90 % has a standard error of {error:.1f} points.")
        else:
            rank_zero_warn(
                f"{said}. What a fit costs in accuracy cannot be measured; more images are worth more than any setting."
            )
