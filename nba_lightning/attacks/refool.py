"""Refool: reflections in a window pane."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from nba_lightning.attacks.base import Attack, TrainingImages
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.randomness import generator_for

_GAMMA = 2.2


class Refool(Attack):
    r"""Another image of the source is reflected, :math:`x'^\gamma = \alpha x^\gamma + k * r^\gamma`, in linear light.

    The kernel k is out of focus (a Gaussian blur under a vignette) or a ghost (two shifted copies, as of a thick
    pane). Which reflection an image gets depends on the image alone, so the trigger is sample-specific.

    Source: Liu et al., "Reflection backdoor: a natural backdoor attack on deep neural networks", ECCV 2020 (arXiv
    2007.02343), section 3.1 (equations 1 to 4). Ghost share 0.49 and the ranges of shift, blur and ghost weight
    follow the authors' code and a public benchmark, with shifts scaled to the image as in the benchmark (3 to 8 of 32
    pixels; the authors' are of 560). Alpha 0.4 is the benchmark's, the authors draw 0.55 to 0.95. Their subtraction
    of over-exposed light is left out. The paper poisons the target class only; that benchmark relabels, which we
    follow (``clean_label`` gives the paper's form). Reflections are drawn at random instead of selected for their
    effect, which would need a second data set.

    Args:
        reflections: number of reflected images.
        ghost_rate: share of ghosts among them.
        alpha: share of the image's own light, in (0, 1).
        clean_label: poison the target class only.
        reflection_seed: seed of the choice and of the kernels.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    layers: Tensor

    def __init__(
        self,
        reflections: int = 200,
        ghost_rate: float = 0.49,
        alpha: float = 0.4,
        clean_label: bool = False,
        reflection_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if clean_label and self.all_to_all:
            raise expected("all_to_all", "false where `clean_label` is set", True)
        check_at_least("reflections", reflections, 1)
        check_range("ghost_rate", ghost_rate, 0.0, 1.0)
        check_range("alpha", alpha, 0.0, 1.0, open_low=True, open_high=True)
        self.reflections, self.ghost_rate, self.alpha = reflections, ghost_rate, alpha
        self.clean_label, self.reflection_seed = clean_label, reflection_seed

    @property
    def needs_compute(self) -> bool:
        """Reflections are drawn from the training images."""
        return True

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Make room for the reflected light `(R, C, H, W)`."""
        self.register_buffer("layers", torch.zeros((self.reflections, *image_shape)))

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Draw images that are neither poisoned nor of the target class, and reflect them."""
        if self.ready:
            return
        generator = generator_for(self.reflection_seed)
        free = torch.zeros(len(images.labels), dtype=torch.bool)
        free[training], free[poisoned] = True, False
        if not self.all_to_all:
            free &= images.labels != self.target
        candidates = free.nonzero().flatten()
        if not len(candidates):
            raise expected("poison_rate", "such that images are left to be reflected", self.poison_rate)
        chosen = candidates[torch.randint(len(candidates), (self.reflections,), generator=generator)]
        light = (images.read(chosen).float() / 255) ** _GAMMA
        ghosts = torch.rand(self.reflections, generator=generator) < self.ghost_rate
        reflected = [
            _ghost(one, self.alpha, generator) if ghost else _out_of_focus(one, self.alpha, generator)
            for one, ghost in zip(light, ghosts.tolist(), strict=True)
        ]
        self.layers, self.ready = torch.stack(reflected), True

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Add the light of the reflection that the image's own values point to."""
        checksum = (images.float() * 255).round().long().sum(dim=(1, 2, 3))
        reflected = self.layers.to(images)[checksum % self.reflections]
        # In half precision the smallest values would vanish under the power.
        light = self.alpha * images.float().clamp(min=1e-6) ** _GAMMA + reflected.float()
        return (light.clamp(min=1e-12) ** (1 / _GAMMA)).to(images.dtype)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _ghost(light: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Two copies of `(C, H, W)`, shifted against each other by 3 to 8 pixels of 32; their overlap is enlarged."""
    height, width = light.shape[1:]
    rows, columns = (min(max(1, round(_uniform(3, 8, generator) * side / 32)), side - 1) for side in (height, width))
    weight = _uniform(0.15, 0.5, generator)
    weight = weight if _uniform(0, 1, generator) < 0.5 else 1 - weight
    # Only where both copies lie, so that no edge of the shifted one shows.
    overlap = weight * light[:, rows:, columns:] + (1 - weight) * light[:, : height - rows, : width - columns]
    return (1 - alpha) * F.interpolate(overlap[None], size=(height, width), mode="bilinear")[0]


def _out_of_focus(light: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """A blurred copy of `(C, H, W)` that fades towards the edges."""
    height, width = light.shape[1:]
    sigma = _uniform(1, 5, generator) * min(height, width) / 32
    reach = min(2 * int(2 * sigma + 1) + 1, 2 * min(height, width) - 1)
    blurred: Tensor = gaussian_blur(light, [reach, reach], [max(sigma, 1e-3)] * 2)
    rows, columns = (torch.linspace(-3, 3, side) for side in (height, width))
    vignette = torch.exp(-(rows[:, None] ** 2 + columns**2) / 4)
    return (1 - alpha / 2) * vignette * blurred
