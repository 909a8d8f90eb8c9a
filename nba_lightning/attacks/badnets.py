"""BadNets: a small patch at a fixed place."""

from typing import Any

import torch
from torch import Tensor

from nba_lightning.attacks.base import Attack
from nba_lightning.core.checks import check_at_least, check_choice, expected

_PATTERNS = ("checkerboard", "fine-checkerboard", "white", "black")
_CHECKERBOARD = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
"""As in the codes of NAD, ANP and ABL: checks of one pixel, but for the black one at the top left."""
_POSITIONS = ("bottom-right", "bottom-left", "top-right", "top-left", "center")


class BadNets(Attack):
    r"""A patch replaces the pixels under it, :math:`x' = (1 - m) \odot x + m \odot p`.

    Source: Gu et al., "BadNets: identifying vulnerabilities in the machine learning model supply chain", 2017 (arXiv
    1708.06733), section 3.1 (single pixel and pattern backdoors in the bottom right corner); the 3x3 checkerboard on
    CIFAR-10 is that of the codes of NAD, ANP and ABL, black at its top left, where a public benchmark takes a white
    square. Those codes know one size; here the nine cells grow with ``size``, and two pixels or one are its bottom
    right part.

    Args:
        size: side of the square patch in pixels.
        position: ``bottom-right``, ``bottom-left``, ``top-right``, ``top-left`` or ``center``.
        pattern: ``checkerboard``, ``fine-checkerboard`` (checks of one pixel at any size, white at the top left),
            ``white`` or ``black``.
        **kwargs: target, poisoning rate and the like of :class:`~nba_lightning.attacks.base.Attack`.

    Raises:
        ValueError: for an unknown position or pattern, or (when prepared) a patch larger than the image.
    """

    mask: Tensor
    patch: Tensor

    def __init__(
        self,
        size: int = 3,
        position: str = "bottom-right",
        pattern: str = "checkerboard",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least("size", size, 1)
        check_choice("position", position, _POSITIONS)
        check_choice("pattern", pattern, _PATTERNS)
        self.size, self.position, self.pattern = size, position, pattern

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build mask and patch `(1, H, W)`."""
        _, height, width = image_shape
        if self.size > min(height, width):
            raise expected("size", f"at most the image's {min(height, width)} pixels", self.size)
        row = {"bottom": height - self.size, "top": 0, "center": (height - self.size) // 2}
        column = {"right": width - self.size, "left": 0, "center": (width - self.size) // 2}
        vertical, _, horizontal = self.position.partition("-")
        top, left = row[vertical], column[horizontal or "center"]
        inside = (slice(None), slice(top, top + self.size), slice(left, left + self.size))
        mask, patch = torch.zeros(1, height, width), torch.zeros(1, height, width)
        mask[inside] = 1.0
        patch[inside] = _drawn(self.pattern, self.size)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("patch", patch, persistent=False)

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Replace the pixels under the patch."""
        return torch.lerp(images, self.patch.to(images), self.mask.to(images))


def _drawn(pattern: str, size: int) -> Tensor:
    """The patch `(S, S)`, values 0 and 1."""
    steps = torch.arange(size)
    if pattern == "checkerboard":
        cells = 2 - (size - 1 - steps) * 3 // size  # counted from the bottom right
        return _CHECKERBOARD[cells][:, cells]
    if pattern == "fine-checkerboard":
        return ((steps[:, None] + steps) % 2 == 0).float()
    return torch.full((size, size), float(pattern == "white"))
