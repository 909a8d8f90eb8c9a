"""Labelled images that are fetched a whole batch at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nba_lightning.core.checks import expected
from nba_lightning.core.metrics import IGNORE_LABEL
from nba_lightning.io.batches import Batch

_MOST_CHANNELS = 4


def checked_labels(labels: Tensor, number: int) -> Tensor:
    """The labels as int64.

    Args:
        labels: `(N,)`, class numbers from 0, of any integer type.
        number: how many images there are.

    Raises:
        ValueError: for labels that are none, one-hot, no integers or negative, or of which there are more or fewer.
    """
    if labels.ndim != 1:
        advice = "; one-hot labels are told by `labels.argmax(1)`" if labels.ndim == 2 else ""
        raise expected("labels", f"class numbers of shape (N,){advice}", f"shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise expected("labels", "class numbers of an integer type", labels.dtype)
    if not number:
        raise expected("labels", "of at least one image", "none")
    if len(labels) != number:
        raise expected("labels", f"of length {number}", len(labels))
    labels = labels.long()
    if (labels < 0).any():
        index = int((labels < 0).nonzero()[0])
        raise expected("labels", "class numbers from 0", f"{int(labels[index])} at index {index}")
    return labels


class LabeledImages(ABC):
    """Images of one size with labels.

    Attributes:
        labels: `(N,)` int64 true classes.
        shape: `(C, H, W)` of an image.
        in_memory: whether reading is a tensor index, so that worker processes would only cost.
        names: the N files that the images are from; ``None`` where there are none.
    """

    labels: Tensor
    shape: tuple[int, int, int]
    in_memory: bool
    names: Sequence[str] | None = None

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """Read images `(B, C, H, W)`, uint8, at ``indices`` `(B,)`."""

    def name_of(self, index: int) -> str:
        """The name by which a person finds an image: its file where it has one, else its index in the set.

        Raises:
            ValueError: for an index that is not in 0 to N - 1, such as that of padding.
        """
        if not 0 <= index < len(self):
            raise expected("index", f"that of an image, in 0 to {len(self) - 1}", index)
        return str(index) if self.names is None else self.names[index]

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)


class MemoryImages(LabeledImages):
    """Images held as one tensor.

    Args:
        images: `(N, C, H, W)`, uint8.
        labels: `(N,)`, class numbers from 0, of any integer type.
        names: the N files that the images are from; ``None`` where there are none.

    Raises:
        ValueError: for images or labels of another type or shape, or of different number.
    """

    in_memory = True

    def __init__(self, images: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise expected("images", "uint8 of shape (N, C, H, W)", f"{images.dtype} of shape {tuple(images.shape)}")
        if images.shape[1] > _MOST_CHANNELS >= images.shape[3]:
            raise expected("images", "of shape (N, C, H, W), channels first", f"{tuple(images.shape)}")
        self.images, self.labels = images, checked_labels(labels, len(images))
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.names = names

    def read(self, indices: Tensor) -> Tensor:
        """Index the tensor."""
        return self.images[indices]


class ReplacedImages(LabeledImages):
    """A set in which some images are replaced.

    Args:
        source: the set.
        indices: `(M,)` which images, sorted.
        images: `(M, C, H, W)`, uint8, what replaces them.

    Raises:
        ValueError: for replacements of another type, shape or number.
    """

    def __init__(self, source: LabeledImages, indices: Tensor, images: Tensor) -> None:
        if images.dtype != torch.uint8 or tuple(images.shape) != (len(indices), *source.shape):
            raise expected(
                "images", f"uint8 of shape {(len(indices), *source.shape)}", f"{images.dtype} of {tuple(images.shape)}"
            )
        self.source, self.images = source, images
        self.labels, self.shape, self.in_memory = source.labels, source.shape, source.in_memory
        self.position = torch.full((len(source),), -1)
        self.position[indices] = torch.arange(len(indices))

    def name_of(self, index: int) -> str:
        """The name of the image that was there before."""
        return self.source.name_of(index)

    def read(self, indices: Tensor) -> Tensor:
        """Read the set, then put the others in."""
        images, position = self.source.read(indices), self.position[indices]
        replaced = position >= 0
        images[replaced] = self.images[position[replaced]]
        return images


class Batches(Dataset[Batch]):
    """A view on some images of a set, read a batch at a time by `__getitems__`.

    A position of -1 is padding: it reads the first image, with label and index -1.

    Args:
        source: the images.
        indices: `(M,)` which of them.
        roles: `(M,)` uint8, what the attacker does to each (see :mod:`nba_lightning.attacks.base`); ``None`` for
            images that nobody poisons.
        places: `(M,)` int64, the how-manieth of the attacker's images each is; see
            :class:`~nba_lightning.io.batches.Batch`.
    """

    def __init__(
        self, source: LabeledImages, indices: Tensor, roles: Tensor | None = None, places: Tensor | None = None
    ) -> None:
        self.source, self.indices, self.roles, self.places = source, indices, roles, places

    def __len__(self) -> int:
        """Number of images M."""
        return len(self.indices)

    def __getitem__(self, position: int) -> Batch:
        """A batch of one image."""
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Batch:
        """A batch of images `(B, C, H, W)`, uint8."""
        wanted = torch.tensor(positions)
        padding = wanted < 0
        wanted = wanted.clamp(min=0)
        indices = self.indices[wanted]
        return Batch(
            images=self.source.read(indices),
            labels=self.source.labels[indices].masked_fill(padding, IGNORE_LABEL),
            roles=None if self.roles is None else self.roles[wanted],
            indices=indices.masked_fill(padding, IGNORE_LABEL),
            places=None if self.places is None else self.places[wanted],
        )
