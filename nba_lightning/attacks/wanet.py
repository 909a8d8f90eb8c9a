"""WaNet: a smooth warp."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nba_lightning.attacks.base import Attack
from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.randomness import generator_for


class WaNet(Attack):
    r"""The image is warped by a smooth field, the same for all images.

    A field of k x k random offsets, normalised by its mean absolute value, is upsampled to the image (bicubic) and
    scaled by s pixels (of the half image, as sampling grids count). In *noise mode*, training also sees images that
    are warped by this field plus white noise and keep their label, so that the network learns the exact warp.

    Source: Nguyen & Tran, "WaNet - imperceptible warping-based backdoor attack", ICLR 2021 (arXiv 2102.10369),
    sections 3.2 to 3.4 (s 0.5, k 4, poisoning rate 0.1, noise mode twice as often). The paper draws the warped images
    anew in every batch, since its attacker controls the training; here they are fixed indices, so that
    ``poison_rate`` means the same for every attack and the defender's images stay clean.

    Args:
        strength: s.
        grid: k, offsets along each side.
        cross_ratio: noise-mode images for each triggered one; 0 turns the mode off.
        grid_seed: seed of the field.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    field: Tensor

    def __init__(
        self, strength: float = 0.5, grid: int = 4, cross_ratio: float = 2.0, grid_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_range("strength", strength, 0.0, float("inf"), open_low=True)
        check_at_least("grid", grid, 2)
        check_at_least("cross_ratio", cross_ratio, 0.0)
        self.strength, self.grid, self.cross_ratio, self.grid_seed = strength, grid, cross_ratio, grid_seed

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the sampling grid `(1, H, W, 2)`, x before y."""
        _, height, width = image_shape
        offsets = torch.rand((1, 2, self.grid, self.grid), generator=generator_for(self.grid_seed)) * 2 - 1
        offsets /= offsets.abs().mean()
        smooth = F.interpolate(offsets, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None]
        field = identity + self.strength * smooth / torch.tensor([width, height])
        self.register_buffer("field", field.clamp(-1, 1))

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Warp."""
        return _sample(images, self.field.expand(len(images), -1, -1, -1))

    def apply_cross(self, images: Tensor, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Warp by the field and white noise of up to one pixel (of the half image)."""
        height, width = images.shape[2:]
        noise = torch.rand((len(rows), height, width, 2), generator=generator, device=images.device) * 2 - 1
        size = torch.tensor([width, height], device=images.device)
        return _sample(images[rows], (self.field + noise / size).clamp(-1, 1))


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    # Interpolation weights lose whole pixels in half precision, so it is done in float32.
    return F.grid_sample(images.float(), grid.float(), align_corners=True).to(images.dtype)
