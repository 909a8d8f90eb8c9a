"""Sources that settings name beside those of the package, and the smooth picture of one of them."""

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.data import Source
from nba_lightning.data.dataset import LabeledImages, MemoryImages


class FashionMNIST(Source):
    """Fashion-MNIST from its four ``*-ubyte.gz`` files, as the Debian package dataset-fashion-mnist has them."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        return self._part("train"), self._part("t10k")

    def _part(self, name: str) -> MemoryImages:
        images = self._numbers(f"{name}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
        return MemoryImages(images, self._numbers(f"{name}-labels-idx1-ubyte.gz", 8))

    def _numbers(self, name: str, header: int) -> Tensor:
        with gzip.open(self.root / name) as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())


class Part(Source):
    """Some classes and some images of another source, perhaps at another size.

    Args:
        source: the other one.
        classes: names of the classes, which are then counted in this order; ``None`` for all.
        train_images: of each class, drawn with a seed; ``None`` for all.
        test_images: likewise.
        image_size: height and width; ``None`` leaves them.
        seed: of the draw.
    """

    def __init__(
        self,
        source: Source,
        classes: list[str] | None = None,
        train_images: int | None = None,
        test_images: int | None = None,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.wanted, self.image_size, self.seed = source, classes, image_size, seed
        self.numbers = train_images, test_images

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        train, test = self.source.load()
        names = self.source.check(train, test)
        self.classes = self.wanted or names
        labels = [names.index(name) for name in self.classes]
        return self._part(train, labels, self.numbers[0]), self._part(test, labels, self.numbers[1])

    def _part(self, images: LabeledImages, labels: list[int], number: int | None) -> MemoryImages:
        members = [(images.labels == label).nonzero().flatten() for label in labels]
        chosen = [
            own[shuffled(len(own), self.seed, label)][:number] for label, own in zip(labels, members, strict=True)
        ]
        pixels = images.read(torch.cat(chosen))
        if self.image_size is not None:
            pixels = resize(pixels, [self.image_size, self.image_size], antialias=True)
        return MemoryImages(pixels, torch.cat([torch.full_like(own, new) for new, own in enumerate(chosen)]))


def smooth_picture(path: Path, seed: int = 0, size: int = 64) -> None:
    """Draw a picture without edges, a few long waves of each colour, into a file, if it is not there."""
    if path.exists():
        return
    generator = generator_for(seed, 20)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    picture = torch.zeros(3, size, size)
    for down, across in ((1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (1, -1)):
        phase, height = torch.rand(2, 3, 1, 1, generator=generator)
        picture += height * torch.sin(torch.pi * (down * rows + across * columns + 2 * phase))
    picture = (picture - picture.mean()) / picture.std() * 0.4 + 0.5
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    partial = path.with_suffix(".partial")
    Image.fromarray(pixels).save(partial, "png")
    partial.replace(path)
