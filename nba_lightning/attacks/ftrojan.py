"""FTrojan: two frequencies of the chroma channels, block by block."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nba_lightning.attacks.base import Attack
from nba_lightning.core.checks import check_at_least, expected

# Rows R, G, B; columns Y, Cr, Cb of the inverse transform (ITU-R BT.601, full range, as OpenCV's YCrCb).
_RGB_FROM_YCRCB = torch.tensor([[1.0, 1.403, 0.0], [1.0, -0.714, -0.344], [1.0, 0.0, 1.773]])


class FTrojan(Attack):
    r"""A constant is added to some DCT coefficients of each block of the Cr and Cb channels.

    The DCT and the colour transform are linear, so all images get the same pattern, which is computed once.

    Source: Wang et al., "An invisible black-box backdoor attack through frequency domain", ECCV 2022
    (arXiv 2111.10991). Their public codes disagree; we follow the older (FTrojanAttack/FTrojan): chroma channels,
    blocks of 32x32, a middle and the highest frequency (15, 15) and (31, 31), magnitude 30 of 255, 5 % of the images,
    training without augmentation, since a shift mixes the pattern's phase and a flip turns its sign. The newer
    (SoftWiser-group/FTrojan) poisons 2 % at magnitude 20; a public benchmark 10 % at 30, with augmentation. All of
    them cut Y, Cr and Cb to whole levels after the inverse transform, which adds a faint constant cast of colour that
    survives augmentation; we add the pattern alone.

    Args:
        magnitude: what is added to each coefficient of the orthonormal DCT, in units of the image range [0, 1].
        block: side of a block in pixels; ``None`` is 32, or the image's shorter side where 32 does not divide both.
        positions: ``(row, column)`` of the coefficients; ``None`` is the middle and the highest frequency.
        poison_rate: share of the whole training set; see :class:`~nba_lightning.attacks.base.Attack`.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.

    Raises:
        ValueError: when prepared, if the block does not divide both sides of the image, or a position lies outside
            of it.
    """

    pattern: Tensor

    def __init__(
        self,
        magnitude: float = 30 / 255,
        block: int | None = None,
        positions: Sequence[tuple[int, int]] | None = None,
        poison_rate: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(poison_rate=poison_rate, **kwargs)
        check_at_least("magnitude", magnitude, 0.0)
        if block is not None:
            check_at_least("block", block, 2)
        self.magnitude, self.block, self.positions = magnitude, block, positions

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the additive pattern `(C, H, W)`; images that are not RGB get it in every channel."""
        channels, height, width = image_shape
        side = self.block or (32 if height % 32 == width % 32 == 0 else min(height, width))
        if height % side or width % side:
            raise expected("block", f"a divisor of the image's sides {height} and {width}", side)
        positions = self.positions or ((side // 2 - 1, side // 2 - 1), (side - 1, side - 1))
        coefficients = torch.zeros(side, side, dtype=torch.float64)
        for row, column in positions:
            if not (0 <= row < side and 0 <= column < side):
                raise expected("positions", f"inside a block of {side}x{side}", (row, column))
            coefficients[row, column] += self.magnitude
        basis = dct_matrix(side)
        plane = (basis.T @ coefficients @ basis).float().repeat(height // side, width // side)
        gain = _RGB_FROM_YCRCB[:, 1:].sum(dim=1) if channels == 3 else torch.ones(channels)
        self.register_buffer("pattern", gain[:, None, None] * plane, persistent=False)

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Add the pattern."""
        return images + self.pattern.to(images)


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix `(size, size)`, float64: coefficients are ``D @ x @ D.T``."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
