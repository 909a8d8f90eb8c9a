"""Adap-Blend: pieces of a pattern mixed into training images, the whole pattern into test images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nba_lightning.attacks.adaptive import AdaptiveAttack
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.images import pattern_or_noise

_MASKS = 1024
"""Masks that are drawn; the attacker's images take them in turn."""


class AdapBlend(AdaptiveAttack):
    r"""A pattern is divided into pieces; each training image carries half of them, :math:`x' = x + \alpha m (p - x)`.

    Source: Qi et al., ICLR 2023 (see :class:`~nba_lightning.attacks.adaptive.AdaptiveAttack`); 16 pieces of which each
    image lacks 8, rates of 0.3 % for poisoned and for cover images. Opacities of 0.15 in training and 0.2 in tests are
    those of the authors' toolbox (vtu81/backdoor-toolbox), whose first code has 0.2 in both. Their pattern is a cartoon
    picture; ours is noise, or your own.

    Args:
        alpha: opacity in training, in (0, 1].
        test_alpha: opacity in tests, in (0, 1].
        grid: pieces along each side.
        mask_rate: share of the pieces that an image lacks, in [0, 1).
        pattern: an image file without transparency, resized to the images; ``None`` is uniform noise drawn from
            ``pattern_seed``.
        pattern_seed: seed of the noise and of the pieces that each image lacks.
        **kwargs: see :class:`~nba_lightning.attacks.adaptive.AdaptiveAttack`.

    Raises:
        ValueError: if an argument is out of range, the pattern is no image file that can be read, or images have fewer
            pixels along a side than there are pieces.
    """

    blend: Tensor
    masks: Tensor

    def __init__(
        self,
        alpha: float = 0.15,
        test_alpha: float = 0.2,
        grid: int = 4,
        mask_rate: float = 0.5,
        pattern: str | None = None,
        pattern_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_range("alpha", alpha, 0.0, 1.0, open_low=True)
        check_range("test_alpha", test_alpha, 0.0, 1.0, open_low=True)
        check_at_least("grid", grid, 1)
        check_range("mask_rate", mask_rate, 0.0, 1.0, open_high=True)
        if pattern is not None and not Path(pattern).is_file():
            raise expected("pattern", "an existing image file", repr(pattern))
        self.alpha, self.test_alpha, self.grid, self.mask_rate = alpha, test_alpha, grid, mask_rate
        self.pattern, self.pattern_seed = pattern, pattern_seed

    def arguments(self) -> dict[str, Any]:
        """As usual; of the image file its name, since folders move and the picture itself is in the state."""
        return super().arguments() | {"pattern": None if self.pattern is None else Path(self.pattern).name}

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the pattern `(C, H, W)`, and masks `(M, G, G)` of the pieces that are there."""
        _, height, width = image_shape
        if min(height, width) < self.grid:
            raise expected("grid", f"at most the image's {min(height, width)} pixels", self.grid)
        pieces = self.grid**2
        drawn = torch.rand(_MASKS, pieces, generator=generator_for(self.pattern_seed, 1)).argsort(dim=1)
        kept = drawn >= round(self.mask_rate * pieces)  # of a permutation, so exactly that many are left out
        self.register_buffer("blend", pattern_or_noise(self.pattern, image_shape, self.pattern_seed))
        self.register_buffer("masks", kept.view(_MASKS, self.grid, self.grid))

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Mix the whole pattern in."""
        return torch.lerp(images, self.blend.to(images).expand_as(images), self.test_alpha)

    def plant(self, images: Tensor, places: Tensor) -> Tensor:
        """Mix each image's own pieces in."""
        rows, columns = (
            torch.arange(side, device=images.device) * self.grid // side for side in images.shape[-2:]
        )  # the piece of each pixel
        kept = self.masks[places % _MASKS][:, rows[:, None], columns].unsqueeze(1)
        return torch.lerp(images, self.blend.to(images).expand_as(images), self.alpha * kept.to(images))
