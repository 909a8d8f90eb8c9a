"""The classification sets of torchvision."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from nba_lightning.core.checks import check_at_least, expected
from nba_lightning.data.dataset import LabeledImages, MemoryImages, checked_labels
from nba_lightning.data.disk import DiskImages
from nba_lightning.data.sources import Source, in_memory_if_small


class Torchvision(Source):
    """A classification set of torchvision.

    Args:
        dataset: class path, for example ``torchvision.datasets.CIFAR10``, ``...CIFAR100``, ``...GTSRB``, ``...SVHN``,
            ``...MNIST`` or ``...FashionMNIST``.
        root: folder that holds the set.
        download: fetch it into ``root`` where it is missing.
        image_size: resize all images to this height and width; needed where sizes differ (GTSRB).
        memory_limit_mib: a set that decodes to more than this (MiB) is read from disk by workers instead.
        splits: names of the training and the test part of a set that has a ``split``, as torchvision calls them
            (ImageNet's are ``train`` and ``val``).

    Raises:
        ValueError: if the class path names no torchvision set with a train and a test part; when loaded, if the set
            is missing, has no such part, or no class number for each image, the same in both parts.
    """

    def __init__(
        self,
        dataset: str = "torchvision.datasets.CIFAR10",
        root: str = ".data",
        download: bool = False,
        image_size: int | None = None,
        memory_limit_mib: int = 2048,
        splits: tuple[str, str] = ("train", "test"),
    ) -> None:
        if image_size is not None:
            check_at_least("image_size", image_size, 1)
        check_at_least("memory_limit_mib", memory_limit_mib, 0)
        self.dataset_class = _import_dataset(dataset)
        self.dataset, self.root, self.download_missing, self.splits = dataset, root, download, splits
        self.image_size, self.memory_limit_mib = image_size, memory_limit_mib

    def download(self) -> None:
        """Fetch both parts if asked for."""
        if self.download_missing:
            for part in (0, 1):
                self._open(part, download=True)

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set."""
        parts = [self._open(part, download=False) for part in (0, 1)]
        classes, others = (_names(part) for part in parts)
        if classes != others:
            raise expected("dataset", "a set with the same classes in both parts", f"{classes} and {others}")
        self.classes = classes
        train = self._images(parts[0], None)
        test = self._images(parts[1], train.shape)
        self.check(train, test)
        return self._loaded(train), self._loaded(test)

    def _images(self, dataset: Any, shape: tuple[int, int, int] | None) -> LabeledImages:
        raw, labels = getattr(dataset, "data", None), _labels_of(dataset, self.dataset)
        if self.image_size is not None or not isinstance(raw, np.ndarray | Tensor):
            size = None if self.image_size is None else (self.image_size, self.image_size)
            return DiskImages(_Pictures(dataset), labels, size, shape=shape)
        images = torch.as_tensor(raw)
        if images.ndim == 3:
            images = images.unsqueeze(1)
        elif images.shape[-1] in (1, 3):
            images = images.permute(0, 3, 1, 2).contiguous()
        return MemoryImages(images, labels)

    def _loaded(self, images: LabeledImages) -> LabeledImages:
        return in_memory_if_small(images, self.memory_limit_mib) if isinstance(images, DiskImages) else images

    def _open(self, part: int, download: bool) -> Any:
        parameters = inspect.signature(self.dataset_class).parameters
        which: dict[str, Any] = {"train": part == 0} if "train" in parameters else {"split": self.splits[part]}
        if "download" in parameters:
            which["download"] = download
        try:
            return self.dataset_class(self.root, **which)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"Expected `root` to hold {self.dataset}, but got {self.root!r}: {error} "
                "Set `download: true` to fetch the set."
            ) from error
        except ImportError as error:
            raise ValueError(f"Expected the packages that {self.dataset} needs, but got: {error}") from error
        except (ValueError, TypeError) as error:  # of the arguments
            raise ValueError(
                f"Expected `dataset` to be a set with a train and a test part (see `splits`), but {self.dataset} "
                f"refuses {which}: {error}"
            ) from error


class _Pictures:
    """Decodes the image at an index of a set that gives ``(PIL image, label)``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> Tensor:
        try:
            picture = self.dataset[index][0]
            if picture.mode in ("L", "RGB"):
                image: Tensor = pil_to_tensor(picture)
                return image
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"Expected every image to be readable, but got at index {index}: {error}.") from error
        raise ValueError(f"Expected images of 8 bits, grey or RGB, but got mode {picture.mode} at index {index}.")


def _names(dataset: Any) -> list[str]:
    """The names of the classes, none where torchvision has none. ImageNet has several for a class."""
    found = getattr(dataset, "classes", None) or ()
    return [name if isinstance(name, str) else ", ".join(name) for name in found]


def _labels_of(dataset: Any, path: str) -> Tensor:
    named = (getattr(dataset, name, None) for name in ("targets", "labels", "_labels"))
    labels = next((found for found in named if found is not None), None)
    if labels is None:
        samples = getattr(dataset, "_samples", None)
        labels = [row[1] for row in (dataset if samples is None else samples)]
        _check_numbering(samples or (), path)
    try:
        return checked_labels(torch.as_tensor(labels), len(dataset))
    except (ValueError, TypeError, RuntimeError) as error:
        raise expected("dataset", "a set with one class number for each image", f"{path}: {error}") from error


def _check_numbering(samples: Any, path: str) -> None:
    """Raise where folders that are named by class numbers (GTSRB's) were counted instead, since some are missing."""
    for place, label in samples:
        folder = Path(place).parent.name if isinstance(place, str) else ""
        if folder.isdigit() and int(folder) != label:
            raise ValueError(
                f"Expected `root` to hold all of {path}, but got a part of it: torchvision counts folder {folder} as "
                f"class {label}."
            )


def _import_dataset(path: str) -> Any:
    import torchvision.datasets

    module, _, name = path.rpartition(".")
    found = getattr(torchvision.datasets, name, None)
    if module != "torchvision.datasets" or not inspect.isclass(found):
        raise expected("dataset", "a class path such as torchvision.datasets.CIFAR10", repr(path))
    if not {"train", "split"} & set(inspect.signature(found).parameters):
        raise expected("dataset", "a set with a train and a test part", repr(path))
    return found
