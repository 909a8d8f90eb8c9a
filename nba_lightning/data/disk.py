"""Images that are decoded when they are asked for, and a whole set of them decoded into memory."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from nba_lightning.data.dataset import LabeledImages, MemoryImages, checked_labels

T = TypeVar("T")
CHUNK = 32
"""Images that a thread decodes at a time: an error ends the loading within so many images of each thread."""
PATIENCE = 2.0
"""Seconds of loading after which a progress bar appears."""


class DiskImages(LabeledImages):
    """Images decoded when they are asked for, by the loader's worker processes. Only the first is opened at the start.

    Args:
        decode: gives the image at an index, `(C, H, W)`, uint8; must be picklable.
        labels: `(N,)`, class numbers from 0, of any integer type.
        size: `(H, W)` to resize to; ``None`` keeps the size of the first image, which all must have.
        names: the N files that the images are from; ``None`` where there are none.
        shape: `(C, H, W)` that all must have; ``None`` takes that of the first image.

    Raises:
        ValueError: for labels of another type, or an image that cannot be read or has another shape, at once for the
            first image, else when it is read.
    """

    in_memory = False

    def __init__(
        self,
        decode: Callable[[int], Tensor],
        labels: Tensor,
        size: tuple[int, int] | None = None,
        names: Sequence[str] | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        number = len(labels) if names is None else len(names)
        self.decode, self.labels, self.size, self.names = decode, checked_labels(labels, number), size, names
        first = self._sized(0)
        self.shape = (first.shape[0], first.shape[1], first.shape[2]) if shape is None else shape
        self._like = f"{self.name_of(0)!r} has" if shape is None else "the training images have"
        self._check_shape(first, 0)

    def read(self, indices: Tensor) -> Tensor:
        """Decode the files."""
        images = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            images[row] = self._checked(index)
        return images

    def in_memory_copy(self) -> MemoryImages:
        """Decode all images now, in threads; with a progress bar where that takes long."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8)

        def fill(start: int) -> None:
            for index in range(start, min(start + CHUNK, len(self))):
                images[index] = self._checked(index)

        starts = range(0, len(self), CHUNK)
        with ThreadPoolExecutor() as pool:  # an error cancels what has not begun
            for _ in with_progress(pool.map(fill, starts), len(starts), "Reading images"):
                pass
        return MemoryImages(images, self.labels, self.names)

    def _checked(self, index: int) -> Tensor:
        image = self._sized(index)
        self._check_shape(image, index)
        return image

    def _sized(self, index: int) -> Tensor:
        image = self.decode(index)
        if self.size is not None and tuple(image.shape[1:]) != tuple(self.size):
            image = resize(image, list(self.size), antialias=True)
        return image

    def _check_shape(self, image: Tensor, index: int) -> None:
        if tuple(image.shape) == self.shape:
            return
        same_channels = image.shape[0] == self.shape[0]
        advice = "Set `image_size` to resize them." if same_channels else "Grey and colour do not mix in one set."
        raise ValueError(
            f"Expected all images to have one shape, {self.shape} as {self._like}, but {self.name_of(index)!r} has "
            f"{tuple(image.shape)}. {advice}"
        )


def with_progress(steps: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass the steps on, with a progress bar on the standard error of the first process once they take long."""
    begin, progress, task = time.monotonic(), None, None
    try:
        for done, step in enumerate(steps, start=1):
            yield step
            if progress is None and time.monotonic() - begin > PATIENCE and getattr(rank_zero_only, "rank", 0) == 0:
                progress = Progress(console=Console(stderr=True))
                progress.start()
                task = progress.add_task(what, total=total)
            if progress is not None and task is not None:
                progress.update(task, completed=done)
    finally:
        if progress is not None:
            progress.stop()
