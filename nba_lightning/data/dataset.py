"""Labelled images that are fetched a whole batch at a time."""

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from nba_lightning.core.checks import expected
from nba_lightning.core.metrics import IGNORE_LABEL
from nba_lightning.io.batches import Batch


class LabeledImages(ABC):
    """Images of one size with labels.

    Attributes:
        labels: `(N,)` int64 true classes.
        shape: `(C, H, W)` of an image.
        in_memory: whether reading is a tensor index, so that worker processes would only cost.
    """

    labels: Tensor
    shape: tuple[int, int, int]
    in_memory: bool

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """Read images `(B, C, H, W)`, uint8, at ``indices`` `(B,)`."""

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)


class MemoryImages(LabeledImages):
    """Images held as one tensor.

    Args:
        images: `(N, C, H, W)`, uint8.
        labels: `(N,)`.
    """

    in_memory = True

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise expected("images", "uint8 of shape (N, C, H, W)", f"{images.dtype} of shape {tuple(images.shape)}")
        if len(images) != len(labels):
            raise expected("labels", f"of length {len(images)}", len(labels))
        self.images, self.labels = images, labels.long()
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def read(self, indices: Tensor) -> Tensor:
        """Index the tensor."""
        return self.images[indices]


class DiskImages(LabeledImages):
    """Images decoded when they are asked for, by the loader's worker processes.

    Args:
        dataset: a set that gives ``(PIL image, label)``, as torchvision's do.
        labels: `(N,)`.
        size: `(H, W)` to resize to; ``None`` keeps the size of the first image, which all must have.
    """

    in_memory = False

    def __init__(self, dataset: Dataset[Any], labels: Tensor, size: tuple[int, int] | None = None) -> None:
        self.dataset, self.labels, self.size = dataset, labels.long(), size
        self.shape = (-1, -1, -1)
        first = self._decode(0)
        self.shape = (first.shape[0], first.shape[1], first.shape[2])

    def read(self, indices: Tensor) -> Tensor:
        """Decode the files."""
        return torch.stack([self._decode(int(i)) for i in indices])

    def in_memory_copy(self) -> MemoryImages:
        """Decode all images now, in threads."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = self._decode(index)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        return MemoryImages(images, self.labels)

    def _decode(self, index: int) -> Tensor:
        try:
            picture = self.dataset[index][0]
        except OSError as error:
            raise ValueError(f"Expected every image to be readable, but got at index {index}: {error}.") from error
        image: Tensor = pil_to_tensor(picture)
        if self.size is not None and tuple(image.shape[1:]) != tuple(self.size):
            image = resize(image, list(self.size), antialias=True)
        if self.shape[0] >= 0 and tuple(image.shape) != self.shape:
            raise ValueError(
                f"Expected all images to have shape {self.shape}, but the one at index {index} has "
                f"{tuple(image.shape)}. Set `image_size` to resize them."
            )
        return image


class ReplacedImages(LabeledImages):
    """A set in which some images are replaced.

    Args:
        source: the set.
        indices: `(M,)` which images, sorted.
        images: `(M, C, H, W)`, uint8, what replaces them.
    """

    def __init__(self, source: LabeledImages, indices: Tensor, images: Tensor) -> None:
        self.source, self.images = source, images
        self.labels, self.shape, self.in_memory = source.labels, source.shape, source.in_memory
        self.position = torch.full((len(source),), -1)
        self.position[indices] = torch.arange(len(indices))

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
    """

    def __init__(self, source: LabeledImages, indices: Tensor, roles: Tensor | None = None) -> None:
        self.source, self.indices, self.roles = source, indices, roles

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
        )
