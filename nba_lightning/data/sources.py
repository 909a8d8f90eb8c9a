"""Where labelled images come from: scikit-learn's digits, torchvision's sets, a folder of one's own."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

from nba_lightning.core.checks import check_at_least, expected, first_few
from nba_lightning.core.randomness import shuffled
from nba_lightning.data.dataset import DiskImages, LabeledImages, MemoryImages


class Source(ABC):
    """Base class of all sources."""

    @abstractmethod
    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set."""

    def download(self) -> None:  # noqa: B027
        """Fetch what is missing, called once per machine. Nothing to do by default."""


class Digits(Source):
    """scikit-learn's 1,797 real 8x8 digits in 10 classes; ships with scikit-learn, no download.

    Args:
        test_fraction: share of each class that is the test set, in (0, 1). The split is always the same.
    """

    def __init__(self, test_fraction: float = 0.2) -> None:
        if not 0.0 < test_fraction < 1.0:
            raise expected("test_fraction", "in (0, 1)", test_fraction)
        self.test_fraction = test_fraction

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set, images `(1, 8, 8)`."""
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images * (255.0 / 16.0)).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        is_test = torch.zeros(len(labels), dtype=torch.bool)
        for label in torch.unique(labels).tolist():
            members = (labels == label).nonzero().flatten()
            is_test[members[shuffled(len(members), label)][: round(self.test_fraction * len(members))]] = True
        return MemoryImages(images[~is_test], labels[~is_test]), MemoryImages(images[is_test], labels[is_test])


class Torchvision(Source):
    """A classification set of torchvision.

    Args:
        dataset: class path, for example ``torchvision.datasets.CIFAR10``, ``...CIFAR100``, ``...GTSRB``, ``...SVHN``,
            ``...MNIST`` or ``...FashionMNIST``.
        root: folder that holds the set.
        download: fetch it into ``root`` where it is missing.
        image_size: resize all images to this height and width; needed where sizes differ (GTSRB).
        memory_limit_mib: a set that decodes to more than this (MiB) is read from disk by workers instead.

    Raises:
        ValueError: if the class path names no torchvision set with a train and a test part, or the set is missing.
    """

    def __init__(
        self,
        dataset: str = "torchvision.datasets.CIFAR10",
        root: str = ".data",
        download: bool = False,
        image_size: int | None = None,
        memory_limit_mib: int = 2048,
    ) -> None:
        self.dataset_class = _import_dataset(dataset)
        self.dataset, self.root, self.download_missing = dataset, root, download
        self.image_size, self.memory_limit_mib = _checked(image_size, memory_limit_mib)

    def download(self) -> None:
        """Fetch both parts if asked for."""
        if self.download_missing:
            for train in (True, False):
                self._open(train, download=True)

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set."""
        train, test = (self._load(part) for part in (True, False))
        return train, test

    def _load(self, train: bool) -> LabeledImages:
        dataset = self._open(train, download=False)
        raw, labels = getattr(dataset, "data", None), _labels_of(dataset)
        if raw is None or self.image_size is not None:
            return _sized(dataset, labels, self.image_size, self.memory_limit_mib)
        images = torch.as_tensor(raw)
        if images.ndim == 3:
            images = images.unsqueeze(1)
        elif images.shape[-1] in (1, 3):
            images = images.permute(0, 3, 1, 2).contiguous()
        return MemoryImages(images, labels)

    def _open(self, train: bool, download: bool) -> Any:
        parameters = inspect.signature(self.dataset_class).parameters
        which: dict[str, Any] = {"train": train} if "train" in parameters else {"split": "train" if train else "test"}
        if "download" in parameters:
            which["download"] = download
        try:
            return self.dataset_class(self.root, **which)
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(
                f"Expected `root` to hold {self.dataset}, but got {self.root!r}: {error} "
                "Set `download: true` to fetch the set."
            ) from error


class ImageFolderSource(Source):
    """A folder of one's own: ``root/train/<class>/*`` and ``root/test/<class>/*``. Images are read as RGB.

    Args:
        root: the folder. Classes are its subfolders in alphabetical order.
        image_size: resize all images to this height and width; needed where sizes differ.
        memory_limit_mib: a set that decodes to more than this (MiB) is read from disk by workers instead.

    Raises:
        ValueError: if a part is missing or has no images, or train and test have different classes.
    """

    def __init__(self, root: str, image_size: int | None = None, memory_limit_mib: int = 2048) -> None:
        self.root = root
        self.image_size, self.memory_limit_mib = _checked(image_size, memory_limit_mib)

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set."""
        train, test = self._open("train"), self._open("test")
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(
                f"Expected `root` to have the same classes in train and test, but got {len(train.classes)} and "
                f"{len(test.classes)}; only in one of them: {first_few(odd)}."
            )
        first, second = (
            _sized(part, torch.tensor(part.targets), self.image_size, self.memory_limit_mib) for part in (train, test)
        )
        return first, second

    def _open(self, part: str) -> ImageFolder:
        folder = Path(self.root) / part
        try:
            return ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ValueError(
                f"Expected `root` to hold images as {part}/<class>/*, but got {str(folder)!r}: {error}."
            ) from error


def _checked(image_size: int | None, memory_limit_mib: int) -> tuple[int | None, int]:
    if image_size is not None:
        check_at_least("image_size", image_size, 1)
    check_at_least("memory_limit_mib", memory_limit_mib, 0)
    return image_size, memory_limit_mib


def _sized(dataset: Any, labels: Tensor, image_size: int | None, memory_limit_mib: int) -> LabeledImages:
    images = DiskImages(dataset, labels, None if image_size is None else (image_size, image_size))
    channels, height, width = images.shape
    fits = len(images) * channels * height * width <= memory_limit_mib * 2**20
    return images.in_memory_copy() if fits else images


def _labels_of(dataset: Any) -> Tensor:
    for name in ("targets", "labels", "_labels"):
        labels: Sequence[int] | None = getattr(dataset, name, None)
        if labels is not None:
            return torch.as_tensor(labels).long()
    return torch.tensor([label for _, label in getattr(dataset, "_samples", None) or dataset])


def _import_dataset(path: str) -> Any:
    import torchvision.datasets

    module, _, name = path.rpartition(".")
    found = getattr(torchvision.datasets, name, None)
    if module != "torchvision.datasets" or not inspect.isclass(found):
        raise expected("dataset", "a class path such as torchvision.datasets.CIFAR10", repr(path))
    if not {"train", "split"} & set(inspect.signature(found).parameters):
        raise expected("dataset", "a set with a train and a test part", repr(path))
    return found
