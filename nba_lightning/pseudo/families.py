"""Families of synthetic triggers: what a trigger may look like, without a look at any.

A *draw* is one trigger: a row of a family's parameters. Every family draws on the device of the images, for any size
and number of channels, and applies row i of its parameters to image i, so that one draw can serve one image or many.
All ranges are shares of the image's size and range. None comes from an attack of :mod:`nba_lightning.attacks`.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]
"""Draws: tensors whose first axis is the number of draws."""


class Family(ABC):
    """Base class of all families."""

    @abstractmethod
    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """Draw triggers.

        Args:
            number: how many, N.
            pool: clean images `(M, C, H, W)`, float, in [0, 1]: their size, device and, for some families, content.
            generator: source of randomness, on the images' device; ``None`` is torch's own.

        Returns:
            Parameters whose first axis is N.
        """

    @abstractmethod
    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Put trigger i on image i.

        Args:
            images: `(B, C, H, W)`, float, in [0, 1].
            parameters: draws with a first axis of B.

        Returns:
            `(B, C, H, W)`, a new tensor; not yet clamped.
        """

    def __repr__(self) -> str:
        """The class name."""
        return f"{type(self).__name__}()"


class Patch(Family):
    """A rectangle of 1/16 to 1/3 of each side, anywhere: of another image, black and white cells, or one colour."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        channels, height, width = pool.shape[1:]
        draw = _Draw(number, pool, generator)
        inside = []
        for side in (height, width):
            size = (draw.log_uniform(1 / 16, 1 / 3, 1) * side).round().clamp(1, side)
            first = (draw.uniform(0.0, 1.0, 1) * (side - size + 1)).floor()
            place = torch.arange(side, device=pool.device)
            inside.append((place >= first) & (place < first + size))
        mask = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(pool)
        cells = draw.cells(1, max(1, round(max(height, width) / 32))).round().expand(-1, channels, -1, -1)
        colour = draw.uniform(0.0, 1.0, channels, 1, 1).expand(-1, -1, height, width)
        kind = draw.uniform(0.0, 3.0, 1, 1, 1)
        pattern = torch.where(kind < 1, draw.others(), torch.where(kind < 2, cells, colour))
        return {"mask": mask, "pattern": pattern}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See :meth:`Family.apply`."""
        return torch.lerp(images, parameters["pattern"].to(images), parameters["mask"].to(images))


class _Mixed(Family):
    """A pattern as large as the image is mixed in, at a share of 0.05 to 0.3."""

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See :meth:`Family.apply`."""
        return torch.lerp(images, parameters["pattern"].to(images), parameters["share"].to(images))


class BlendImage(_Mixed):
    """Another image, mirrored or not, mixed in at a share of 0.05 to 0.3."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        draw = _Draw(number, pool, generator)
        other = draw.others()
        return {"share": draw.uniform(0.05, 0.3, 1, 1, 1), "pattern": draw.either(other.flip(3), other)}


class BlendNoise(_Mixed):
    """Uniform noise of pixels, or of cells of two by two, mixed in at a share of 0.05 to 0.3."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        draw, channels = _Draw(number, pool, generator), pool.shape[1]
        pattern = draw.either(draw.cells(channels, 1), draw.cells(channels, 2))
        return {"share": draw.uniform(0.05, 0.3, 1, 1, 1), "pattern": pattern}


class _Added(Family):
    """A field is added."""

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See :meth:`Family.apply`."""
        return images + parameters["field"].to(images)


class SmoothField(_Added):
    """A smooth field, of all channels alike or of each, with a peak of 0.05 to 0.3."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        draw = _Draw(number, pool, generator)
        field = draw.smooth(pool.shape[1])
        grey = _peaked(field[:, :1]).expand_as(field)
        return {"field": draw.either(grey, field) * draw.uniform(0.05, 0.3, 1, 1, 1)}


class Sinusoid(_Added):
    """A plane wave in any direction, of one period to a quarter of the pixels, with an amplitude of 0.02 to 0.2."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        channels, height, width = pool.shape[1:]
        draw = _Draw(number, pool, generator)
        periods = draw.log_uniform(1.0, max(2.0, max(height, width) / 4), 1, 1, 1)
        angle = draw.uniform(0.0, math.pi, 1, 1, 1)
        rows = torch.arange(height, device=pool.device)[:, None] / height
        columns = torch.arange(width, device=pool.device) / width
        wave = 2 * math.pi * periods * (rows * angle.sin() + columns * angle.cos())
        phases, gains = draw.uniform(0.0, 2 * math.pi, channels, 1, 1), draw.uniform(-1.0, 1.0, channels, 1, 1)
        coloured, grey = (wave + phases).sin() * gains, (wave + phases[:, :1]).sin()
        return {"field": draw.either(grey.expand_as(coloured), coloured) * draw.uniform(0.02, 0.2, 1, 1, 1)}


class Frequencies(_Added):
    """One to three cosine coefficients, of the image or of blocks of a quarter of it, with a peak of 0.02 to 0.2."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        channels, height, width = pool.shape[1:]
        draw = _Draw(number, pool, generator)
        blocks = 1 + 3 * (draw.uniform(0.0, 1.0, 1) < 0.5).to(pool)
        waves = []
        for side in (height, width):
            size = (side / blocks).floor().clamp(min=2.0)
            order = (draw.uniform(0.0, 1.0, 3) * size).floor()[..., None]
            place = (torch.arange(side, device=pool.device) % size)[:, None]
            waves.append(torch.cos(math.pi * (2 * place + 1) * order / (2 * size[..., None])))
        on = draw.uniform(0.0, 1.0, 3) < torch.tensor([1.0, 0.5, 0.5], device=pool.device)
        gains = draw.uniform(-1.0, 1.0, channels, 3) * on[:, None]
        field = (gains[..., None] * waves[0][:, None]).transpose(2, 3) @ waves[1][:, None]
        return {"field": _peaked(field) * draw.uniform(0.02, 0.2, 1, 1, 1)}


class Warp(Family):
    """A smooth displacement of at most 1/64 to 1/12 of the image."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        height, width = pool.shape[2:]
        draw = _Draw(number, pool, generator)
        flow = draw.smooth(2) * draw.log_uniform(1 / 32, 1 / 6, 1, 1, 1)  # the grid's range is 2
        rows, columns = (torch.linspace(-1.0, 1.0, side, device=pool.device) for side in (height, width))
        grid = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])
        return {"grid": (grid + flow).permute(0, 2, 3, 1)}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See :meth:`Family.apply`."""
        grid = parameters["grid"].to(images)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)


class Quantisation(Family):
    """Colours in 3 to 16 levels, half of the draws dithered by noise that stays in place."""

    def draw(self, number: int, pool: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """See :meth:`Family.draw`."""
        draw = _Draw(number, pool, generator)
        noise = draw.cells(pool.shape[1], 1) - 0.5
        return {"levels": draw.log_uniform(3.0, 16.0, 1, 1, 1).round(), "dither": draw.either(noise, 0 * noise)}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See :meth:`Family.apply`."""
        steps = parameters["levels"].to(images) - 1
        return (images * steps + parameters["dither"].to(images)).round() / steps


def all_families() -> list[Family]:
    """One of each."""
    return [Patch(), BlendImage(), BlendNoise(), SmoothField(), Sinusoid(), Warp(), Quantisation(), Frequencies()]


class _Draw:
    """Random values for N draws, on the device of a pool of images."""

    def __init__(self, number: int, pool: Tensor, generator: torch.Generator | None) -> None:
        self.number, self.pool, self.generator = number, pool.float(), generator

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        """`(N, *size)`, uniform."""
        values = torch.rand((self.number, *size), generator=self.generator, device=self.pool.device)
        return low + (high - low) * values

    def log_uniform(self, low: float, high: float, *size: int) -> Tensor:
        """`(N, *size)`, uniform in the logarithm."""
        return self.uniform(math.log(low), math.log(high), *size).exp()

    def either(self, first: Tensor, second: Tensor) -> Tensor:
        """One of two `(N, C, H, W)` for each draw."""
        return torch.where(self.uniform(0.0, 1.0, 1, 1, 1) < 0.5, first, second)

    def others(self) -> Tensor:
        """Images of the pool `(N, C, H, W)`."""
        chosen = torch.randint(len(self.pool), (self.number,), generator=self.generator, device=self.pool.device)
        return self.pool[chosen]

    def cells(self, channels: int, side: int) -> Tensor:
        """Uniform noise `(N, channels, H, W)` in square cells."""
        height, width = self.pool.shape[2:]
        noise = self.uniform(0.0, 1.0, channels, -(-height // side), -(-width // side))
        return noise.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]

    def smooth(self, channels: int) -> Tensor:
        """Sums of cosines `(N, channels, H, W)` of at most one to three periods, with a peak of 1."""
        orders = torch.arange(7, device=self.pool.device)
        highest = self.uniform(2.0, 7.0, 1, 1, 1)
        gains = torch.randn((self.number, channels, 7, 7), generator=self.generator, device=self.pool.device)
        gains = gains * ((orders[:, None] <= highest) & (orders <= highest))
        waves = [
            torch.cos(math.pi * orders[:, None] * (torch.arange(side, device=self.pool.device) + 0.5) / side)
            for side in self.pool.shape[2:]
        ]
        return _peaked(waves[0].T @ gains @ waves[1])


def _peaked(field: Tensor) -> Tensor:
    """Scaled to a largest absolute value of 1, each draw for itself."""
    return field / field.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
