"""BPP: fewer colours."""

from typing import Any

import torch
from torch import Tensor

from nba_lightning.attacks.base import Attack
from nba_lightning.core.checks import check_at_least

# Floyd & Steinberg's diffusion of the error: to the right, below left, below, below right.
_RIGHT, _BELOW_LEFT, _BELOW, _BELOW_RIGHT = 7 / 16, 3 / 16, 5 / 16, 1 / 16


class BPP(Attack):
    r"""Every channel is rounded to few levels, :math:`x' = \mathrm{round}(x (L - 1)) / (L - 1)`.

    Training also sees negative images, which get the rounding errors of *other* images and keep their label, so that
    only an image's own rounding is the trigger.

    Source: Wang et al., "BppAttack: stealthy and efficient trojan attacks against deep neural networks via image
    quantization and contrastive adversarial learning", CVPR 2022 (arXiv 2205.13383), section 4. Levels, negative
    share and no dithering are the defaults of the public codes (8 levels, though one's example asks for 32; as many
    negative images as triggered ones, 20 % each in the authors' code and 10 % in a public benchmark, as here); the
    paper describes dithering. Their adversarial examples as further negatives are left out, as there.

    Args:
        levels: levels L of each channel, 2 to 256.
        dithering: diffuse the rounding error to pixels on the right and below (Floyd & Steinberg, 1976).
        negative_ratio: negative images for each triggered one.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    free_arguments = Attack.free_arguments | {"negative_ratio"}

    def __init__(self, levels: int = 8, dithering: bool = False, negative_ratio: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("levels", levels, 2)
        check_at_least("negative_ratio", negative_ratio, 0.0)
        self.levels, self.dithering, self.cross_ratio = levels, dithering, negative_ratio

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Round to the levels."""
        if self.dithering:
            return floyd_steinberg(images, self.levels)
        return _rounded(images, self.levels)

    def apply_cross(self, images: Tensor, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Add the rounding errors of other images of the batch."""
        shift = torch.randint(1, max(2, len(images)), (1,), generator=generator, device=images.device)
        others = images[(rows + shift) % len(images)]
        return images[rows] + (self.apply_trigger(others) - others)


def _rounded(images: Tensor, levels: int) -> Tensor:
    return (images * (levels - 1)).round_().div_(levels - 1)


def floyd_steinberg(images: Tensor, levels: int) -> Tensor:
    """Round with error diffusion, a whole batch and a whole wavefront of pixels at a time.

    A pixel needs its left neighbour and the row above up to the next column, so all pixels with the same
    ``column + 2 * row`` are independent of each other.

    Args:
        images: `(B, C, H, W)`, float, values in [0, 1].
        levels: levels of each channel.

    Returns:
        `(B, C, H, W)`, multiples of ``1 / (levels - 1)``.
    """
    *_, height, width = images.shape
    # A frame of one pixel on the left, right and below takes the errors that leave the image.
    work = torch.nn.functional.pad(images.float(), (1, 1, 0, 1)).clone()
    result = torch.empty_like(images, dtype=torch.float32)
    rows = torch.arange(height, device=images.device)
    for front in range(width + 2 * (height - 1)):
        first, last = max(0, (front - width + 2) // 2), min(height - 1, front // 2)
        row = rows[first : last + 1]
        column = front - 2 * row + 1
        value = work[:, :, row, column]
        rounded = _rounded(value, levels)
        error = value - rounded
        result[:, :, row, column - 1] = rounded
        work[:, :, row, column + 1] += error * _RIGHT
        work[:, :, row + 1, column - 1] += error * _BELOW_LEFT
        work[:, :, row + 1, column] += error * _BELOW
        work[:, :, row + 1, column + 1] += error * _BELOW_RIGHT
    return result.to(images.dtype)
