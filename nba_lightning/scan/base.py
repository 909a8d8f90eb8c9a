"""What every scan is: a network (and clean images) in, a statistic and a p-value for each class out."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.progress import track
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_image_batch, check_unit_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.metrics import IGNORE_LABEL
from nba_lightning.core.modes import check_finite, evaluating
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.batches import as_batch
from nba_lightning.scan.result import ScanResult
from nba_lightning.scan.statistics import LEAST_CLASSES, Rule, StudentisedMaximum


@dataclass
class Subject:
    """The network that is scanned, with what a scan must know of it.

    Attributes:
        network: in ``eval`` mode; its parameters are never changed and get no gradient.
        image_shape: `(C, H, W)`.
        num_classes: K, at least 3.
        device: of the network.
        dtype: of the network.
        progress: whether long work shows a bar.
        passes: images that went through a network so far, forwards or backwards.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    num_classes: int
    device: torch.device
    dtype: torch.dtype
    progress: bool = True
    passes: int = 0

    def logits(self, images: Tensor, network: nn.Module | None = None) -> Tensor:
        """Logits `(B, K)`, float32, of images `(B, C, H, W)` in [0, 1]; of another network where one is given."""
        self.passes += len(images)
        return predict(network or self.network, images.to(self.dtype)).float()

    def gradient(self, value: Tensor, leaf: Tensor, images: int) -> Tensor:
        """Gradient of a scalar by ``leaf``, through ``images`` images; parameters get none."""
        self.passes += images
        return torch.autograd.grad(value, leaf)[0].float()

    def steps(self, number: int, what: str) -> Iterator[int]:
        """0 to ``number`` - 1, with a progress bar."""
        yield from track(range(number), what, transient=True, disable=not self.progress)


@dataclass
class Measured:
    """What a scan measured.

    Attributes:
        statistics: `(K,)`; the larger, the more easily the class is reached.
        details: further figures, plain values.
        pictures: see :class:`~nba_lightning.scan.result.ScanResult`.
        examples: likewise.
    """

    statistics: Tensor
    details: Mapping[str, Any] = field(default_factory=dict)
    pictures: Tensor | None = None
    examples: Tensor | None = None


class Scan(nn.Module, ABC):
    """Base class of all scans; a subclass writes :meth:`measure`.

    ``scan(network, loader)`` works on any image classifier, on the network's device, and leaves the network as it was:
    parameters, buffers, modes, gradients and ``requires_grad``. Under a Trainer, see
    :class:`~nba_lightning.scan.scanning.Scanning`. What no scan of this package can see: an all-to-all backdoor, or
    several targets, since classes are compared with each other; and whether an outlier was implanted or is natural. A
    scan that finds nothing proves nothing.

    Args:
        rule: how statistics become p-values; :class:`~nba_lightning.scan.statistics.StudentisedMaximum` by default.
        batch_size: images that go through the network at a time.
        max_images: clean images that are used, drawn at random from all that the loader has. They are held in memory.
        seed: of all random draws.
    """

    name: ClassVar[str]
    needs_images: ClassVar[bool] = True
    """Whether the method looks at clean images; else the loader only says how large images are."""

    def __init__(self, rule: Rule | None = None, batch_size: int = 256, max_images: int = 1000, seed: int = 0) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("max_images", max_images, 1)
        self.rule = rule or StudentisedMaximum()
        self.batch_size, self.max_images, self.seed = batch_size, max_images, seed

    @abstractmethod
    def measure(self, subject: Subject, images: Tensor, labels: Tensor | None) -> Measured:
        """One statistic for each class.

        Args:
            subject: the network and what is known of it.
            images: `(N, C, H, W)`, float, in [0, 1], in host memory; none for a scan that needs none.
            labels: `(N,)` true classes, or ``None`` where the loader has none.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The method's own arguments, plain values, for the record."""

    def forward(
        self,
        network: nn.Module,
        loader: Iterable[Any] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        progress: bool = True,
    ) -> ScanResult:
        """Scan a network.

        Args:
            network: images `(B, C, H, W)` in [0, 1] to logits `(B, K)`.
            loader: batches of clean images, with labels or without: tensors, ``(images, labels)`` or dictionaries.
            image_shape: `(C, H, W)`, instead of a loader, for scans that need no images.
            progress: show a bar where it takes long.

        Raises:
            ValueError: for fewer than three classes, weights that are not finite, a loader without images, images
                outside [0, 1], or neither a loader nor (where that suffices) a shape.
        """
        if loader is None:
            if self.needs_images or image_shape is None:
                raise expected("loader", f"given for {type(self).__name__}", loader)
            return self.scan(network, torch.empty(0, *image_shape), None, progress)
        kept = Reservoir(self.max_images, self.seed)
        for batch in loader:
            kept.add(*images_of(batch, network))
            if not self.needs_images and kept.seen:
                break
        return self.scan(network, *kept.content(), progress)

    def scan(self, network: nn.Module, images: Tensor, labels: Tensor | None, progress: bool = True) -> ScanResult:
        """Scan a network by clean images `(N, C, H, W)` in [0, 1], with labels `(N,)` or without."""
        start = time.perf_counter()
        check_finite(network, "network")
        # Within `Trainer.test` gradients are off, and what was made there cannot enter a graph: hence the copy.
        with torch.inference_mode(False), torch.enable_grad(), evaluating(network, self):
            subject = _subject(network, images, progress)
            measured = self.measure(subject, images.detach().clone(), None if labels is None else labels.clone())
        statistics = measured.statistics.double().tolist()
        return ScanResult(
            self.name,
            tuple(statistics),
            tuple(self.rule(statistics)),
            self.rule.name,
            time.perf_counter() - start,
            subject.passes,
            {"seed": self.seed, "images": len(images) if self.needs_images else 0, **self.settings()},
            measured.details,
            None if measured.pictures is None else measured.pictures.detach().cpu(),
            None if measured.examples is None else measured.examples.detach().cpu(),
        )


class Reservoir:
    """A random sample of a stream of images, each as likely as the other, also where the stream is sorted by class.

    Args:
        limit: images to keep.
        seed: of the draw.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit, self.seen = limit, 0
        self._generator = generator_for(seed, 11)
        self._parts: tuple[Tensor, Tensor, Tensor | None] | None = None

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """Images `(B, C, H, W)` and labels `(B,)`, moved to host memory."""
        keys = torch.rand(len(images), generator=self._generator)
        images, labels = images.detach().cpu(), None if labels is None else labels.detach().cpu()
        if self._parts is not None:
            old_keys, old_images, old_labels = self._parts
            keys, images = torch.cat([old_keys, keys]), torch.cat([old_images, images])
            labels = None if labels is None or old_labels is None else torch.cat([old_labels, labels])
        self.seen += len(keys) - (0 if self._parts is None else len(self._parts[0]))
        chosen = keys.topk(min(self.limit, len(keys))).indices.sort().values
        self._parts = keys[chosen], images[chosen], None if labels is None else labels[chosen]

    def content(self) -> tuple[Tensor, Tensor | None]:
        """Images `(N, C, H, W)` and labels `(N,)`.

        Raises:
            ValueError: if there are none.
        """
        if self._parts is None or not self.seen:
            raise ValueError("Expected `loader` to hold images, but got none.")
        return self._parts[1:]


def images_of(batch: Any, network: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Images `(B, C, H, W)`, float, in [0, 1], and labels `(B,)` of a loader's batch, without what is padding."""
    found = as_batch(batch, network)
    images = found.images
    if images.dtype == torch.uint8:
        images = images.float() / 255
    check_image_batch("images", images)
    if len(images):
        check_unit_range("images", images)
    labels = found.labels
    if not isinstance(labels, Tensor) or labels.shape != (len(images),):
        return images.float(), None
    real = labels != IGNORE_LABEL
    return images[real].float(), labels[real].long()


def inward(inputs: Tensor, ascent: Tensor) -> Tensor:
    """Directions of ascent without what points out of [0, 1], which would use up the length of a normalised step."""
    return ascent.masked_fill(((inputs <= 0) & (ascent < 0)) | ((inputs >= 1) & (ascent > 0)), 0.0)


@torch.no_grad()
def _subject(network: nn.Module, images: Tensor, progress: bool) -> Subject:
    shape = (images.shape[1], images.shape[2], images.shape[3])
    weight = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    probe = torch.zeros((2, *shape), device=weight.device, dtype=weight.dtype)
    try:
        logits = predict(network, probe)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise expected("network", f"one that takes images of shape {shape}", f"an error: {error}") from error
    if logits.ndim != 2 or len(logits) != 2 or logits.shape[1] < LEAST_CLASSES:
        raise expected(
            "network",
            f"one with a logit for each of at least {LEAST_CLASSES} classes, since a class can stand out only among "
            "others",
            f"output of shape {tuple(logits.shape)} for 2 images",
        )
    return Subject(network, shape, logits.shape[1], weight.device, weight.dtype, progress)
