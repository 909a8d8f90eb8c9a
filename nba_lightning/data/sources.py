"""Where labelled images come from: what all sources share, and scikit-learn's digits."""

from abc import ABC, abstractmethod

import torch

from nba_lightning.core.checks import expected, first_few
from nba_lightning.core.randomness import shuffled
from nba_lightning.data.dataset import LabeledImages, MemoryImages
from nba_lightning.data.disk import DiskImages
from nba_lightning.data.partition import divided


class Source(ABC):
    """Base class of all sources.

    Attributes:
        classes: names of the classes in the order of their numbers. A source whose classes have names sets it in
            ``load`` at the latest; else :meth:`check` sets it to the numbers.
    """

    classes: list[str]

    @abstractmethod
    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set."""

    def download(self) -> None:  # noqa: B027
        """Fetch what is missing, called once per machine. Nothing to do by default."""

    def check(self, train: LabeledImages, test: LabeledImages) -> list[str]:
        """The names of the classes, after making sure that the labels of both sets count the same classes.

        Args:
            train: the training set.
            test: the test set.

        Returns:
            ``classes``, K names.

        Raises:
            ValueError: if there are fewer than two classes, either set has labels beyond 0 to K - 1, one has a class
                that the other has not, or classes without names leave a gap.
        """
        found, others = (set(torch.unique(images.labels).tolist()) for images in (train, test))
        named = list(getattr(self, "classes", ()))
        names = named or [str(label) for label in range(max(found, default=0) + 1)]
        beyond, gaps = found - set(range(len(names))), set(range(len(names))) - found
        if len(found) < 2:
            raise ValueError(f"Expected training images of at least 2 classes, but got {len(found)}.")
        if found != others:
            raise ValueError(
                "Expected training and test images of the same classes, but got only in training "
                f"{_listed(found - others)} and only in test {_listed(others - found)}."
            )
        if beyond:
            raise expected("labels", f"in 0 to {len(names) - 1}, for {len(names)} classes", _listed(beyond))
        if gaps and not named:
            raise expected("labels", "from 0 without a gap", f"up to {max(found)} without {_listed(gaps)}")
        self.classes = names
        return names


def _listed(labels: set[int]) -> str:
    return first_few(str(label) for label in sorted(labels)) or "none"


class Digits(Source):
    """scikit-learn's 1,797 real 8x8 digits in 10 classes; ships with scikit-learn, no download.

    Args:
        test_fraction: share of each class that is the test set, in (0, 1). The split is always the same.
    """

    def __init__(self, test_fraction: float = 0.2) -> None:
        if not 0.0 < test_fraction < 1.0:
            raise expected("test_fraction", "in (0, 1)", test_fraction)
        self.test_fraction = test_fraction
        self.classes = [str(digit) for digit in range(10)]

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set, images `(1, 8, 8)`."""
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images * (255.0 / 16.0)).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        is_test = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(10):
            members = (labels == label).nonzero().flatten()
            is_test[divided(members[shuffled(len(members), label)], self.test_fraction)[1]] = True
        if not is_test.any():
            raise expected("test_fraction", "large enough for a test image of each class", self.test_fraction)
        return MemoryImages(images[~is_test], labels[~is_test]), MemoryImages(images[is_test], labels[is_test])


def in_memory_if_small(images: DiskImages, limit_mib: int) -> LabeledImages:
    """The set decoded into memory where it takes at most so many MiB there, else as it is."""
    channels, height, width = images.shape
    fits = len(images) * channels * height * width <= limit_mib * 2**20
    return images.in_memory_copy() if fits else images
