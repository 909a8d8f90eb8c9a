"""Adap-Patch: one of several weak patches on each training image, several strong ones on test images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nba_lightning.attacks.adaptive import AdaptiveAttack
from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.images import read_pattern

_CHECKS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
"""The authors' patch in the upper left corner; the others mirror it."""


class AdapPatch(AdaptiveAttack):
    r"""Each training image carries one of k patches, :math:`x' = x + \alpha_j m_j (p_j - x)`; tests show several.

    Source: Qi et al., ICLR 2023 (see :class:`~nba_lightning.attacks.adaptive.AdaptiveAttack`); four patches at
    opacities 0.5, 0.2, 0.5 and 0.3, the first and the third at 1 in tests, 0.3 % of poisoned and 0.6 % of cover images.
    The authors' patches are two logos, a checkerboard in each corner and a square; ours have their places and sizes (on
    32 pixels; others in proportion), with colours drawn at random: a corner of 5 pixels, in tests in both lower
    corners; a disc of 13 above; checkerboards of 3 in all corners; a square of 8 below. The authors deal patches out in
    blocks, in the order of the data set; here the attacker's images take them in turn, since a folder is in the order
    of its classes.

    Args:
        opacities: of each patch in training, in (0, 1].
        test_patches: which patches tests show, counted from 0; a later one lies above an earlier one.
        test_opacity: their opacity, in (0, 1].
        pictures: image files of your own, as large as the images, one for each opacity; what is black in them is left
            out. ``None`` for the four above.
        pattern_seed: seed of the colours.
        cross_ratio: see :class:`~nba_lightning.attacks.adaptive.AdaptiveAttack`.
        **kwargs: likewise.

    Raises:
        ValueError: if an argument is out of range, a test patch does not exist, or the number of opacities is not that
            of the patches; when prepared, if a picture cannot be read or is black.
    """

    patches: Tensor
    masks: Tensor
    test_image: Tensor
    test_mask: Tensor

    def __init__(
        self,
        opacities: Sequence[float] = (0.5, 0.2, 0.5, 0.3),
        test_patches: Sequence[int] = (0, 2),
        test_opacity: float = 1.0,
        pictures: Sequence[str] | None = None,
        pattern_seed: int = 0,
        cross_ratio: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(cross_ratio=cross_ratio, **kwargs)
        for opacity in (*opacities, test_opacity):
            check_range("opacity", opacity, 0.0, 1.0, open_low=True)
        number = 4 if pictures is None else len(pictures)
        if not number or len(opacities) != number:
            raise expected("opacities", f"one for each of {number} patches, at least one", list(opacities))
        if not test_patches or not all(0 <= patch < number for patch in test_patches):
            raise expected("test_patches", f"some of 0 to {number - 1}", list(test_patches))
        for picture in pictures or ():
            if not Path(picture).is_file():
                raise expected("pictures", "existing image files", repr(picture))
        self.opacities, self.test_patches, self.test_opacity = opacities, test_patches, test_opacity
        self.pictures, self.pattern_seed = pictures, pattern_seed

    def arguments(self) -> dict[str, Any]:
        """As usual; of the image files their names, since folders move and the pictures themselves are in the state."""
        names = None if self.pictures is None else [Path(picture).name for picture in self.pictures]
        return super().arguments() | {"pictures": names}

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build patches `(k, C, H, W)` and masks `(k, 1, H, W)`, and what tests show."""
        if self.pictures is None:
            patches, masks = _generated(image_shape, self.pattern_seed)
        else:
            patches = torch.stack([read_pattern(picture, image_shape) for picture in self.pictures])
            masks = (patches > 0).any(dim=1, keepdim=True).float()
            if not masks.flatten(1).any(dim=1).all():
                raise expected("pictures", "images that are not black", self.pictures)
        shown, covered = torch.zeros(image_shape), torch.zeros(1, *image_shape[1:])
        for index in self.test_patches:
            own, mask = patches[index], masks[index]
            if self.pictures is None and index == 0:  # in tests also in the other lower corner
                size = _scaled(5, image_shape)
                own, mask = (torch.maximum(part, part.roll(size, dims=-1)) for part in (own, mask))
            shown, covered = torch.lerp(shown, own, mask), torch.maximum(covered, mask)
        for name, value in {"patches": patches, "masks": masks, "test_image": shown, "test_mask": covered}.items():
            self.register_buffer(name, value)

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Put the patches of tests on, all at once."""
        return torch.lerp(images, self.test_image.to(images), self.test_opacity * self.test_mask.to(images))

    def plant(self, images: Tensor, places: Tensor) -> Tensor:
        """Put one patch on each image, in turn."""
        chosen = places % len(self.opacities)
        opacities = torch.tensor(self.opacities, device=images.device)[chosen, None, None, None]
        return torch.lerp(images, self.patches[chosen].to(images), (opacities * self.masks[chosen]).to(images))


def _scaled(pixels: int, image_shape: tuple[int, int, int]) -> int:
    """So many pixels of 32 on images of this shape, rounded up."""
    return -(-pixels * min(image_shape[1:]) // 32)


def _generated(image_shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """The four patches `(4, C, H, W)` and their masks `(4, 1, H, W)`."""
    channels, height, width = image_shape
    patches, masks = torch.zeros(4, *image_shape), torch.zeros(4, 1, height, width)

    def draw(index: int, size: int, top: int, left: int, cells: int, mask: Tensor | None = None) -> None:
        colours = torch.rand(1, channels, cells, cells, generator=generator_for(seed, index))
        inside = (slice(None), slice(top, top + size), slice(left, left + size))
        masks[index][inside] = torch.ones(size, size) if mask is None else mask
        patches[index][inside] = F.interpolate(colours, (size, size), mode="bilinear", align_corners=True)[0]

    corner, disc, square = (_scaled(pixels, image_shape) for pixels in (5, 13, 8))
    edge = max(1, 3 * min(height, width) // 32)  # rounded down, so that the corner is seen below it
    draw(0, corner, height - corner, width - corner, corner)
    steps = torch.arange(disc) - (disc - 1) / 2
    draw(
        1,
        disc,
        height // 32,
        width - disc - width // 32,
        4,
        (steps[:, None] ** 2 + steps**2 <= (disc / 2) ** 2).float(),
    )
    draw(3, square, height - square - edge, width - square - edge, 4)
    checks = F.interpolate(_CHECKS[None, None], (edge, edge))[0, 0]
    for rows, vertical in ((slice(0, edge), checks), (slice(height - edge, None), checks.flip(0))):
        for columns, patch in ((slice(0, edge), vertical), (slice(width - edge, None), vertical.flip(1))):
            patches[2][:, rows, columns], masks[2][:, rows, columns] = patch, 1.0
    return patches * masks, masks
