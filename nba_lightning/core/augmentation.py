"""Augmentation of whole batches on the device: random crop and flip, and CutMix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_image_batch, expected

_SLICED_FROM = 64 * 64
"""Pixels from which, on the CPU, a slice of each image beats one gather of the batch, whose index is int64."""


class RandomCropFlip(nn.Module):
    """Shift every image by its own random offset (zero padding) and mirror half of them.

    The usual CIFAR augmentation (He et al., CVPR 2016, section 4.2), vectorised over the batch.

    Args:
        padding: largest shift in pixels; ``None`` means an eighth of the height (4 at 32 pixels).
        flip: mirror left and right with probability 1/2.

    Raises:
        ValueError: for images of another number of axes.
    """

    def __init__(self, padding: int | None = None, flip: bool = True) -> None:
        super().__init__()
        if padding is not None:
            check_at_least("padding", padding, 0)
        self.padding = padding
        self.flip = flip

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment a batch.

        Args:
            images: `(B, C, H, W)`, of any type.
            generator: source of the offsets, on the images' device.

        Returns:
            `(B, C, H, W)`, of the same type.
        """
        if images.ndim != 4:
            raise expected("images", "a batch (B, C, H, W)", f"shape {tuple(images.shape)}")
        batch, channels, height, width = images.shape
        padding = height // 8 if self.padding is None else self.padding
        device = images.device
        offsets = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator, device=device)
        mirrored = torch.zeros((batch, 1), dtype=torch.bool, device=device)
        if self.flip:
            mirrored = torch.rand((batch, 1), generator=generator, device=device) < 0.5
        if device.type == "cpu" and height * width >= _SLICED_FROM:
            return _sliced(images, offsets - padding, mirrored)
        rows = offsets[0] + torch.arange(height, device=device)
        columns = offsets[1] + torch.arange(width, device=device)
        if self.flip:
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (padding,) * 4)
        pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(batch, 1, -1)
        return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


def _sliced(images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Crop and flip one image after the other, without an index or a padded copy.

    Args:
        images: `(B, C, H, W)`.
        shifts: `(2, B, 1)` rows and columns by which the crop begins after the image, or before it.
        mirrored: `(B, 1)` bool.
    """
    height, width = images.shape[2:]
    result = torch.zeros_like(images, memory_format=torch.contiguous_format)
    for image, out, down, right, flip in zip(
        images, result, *shifts.flatten(1).tolist(), mirrored.flatten().tolist(), strict=True
    ):
        part = image[:, max(0, down) : max(0, height + min(0, down)), max(0, right) : max(0, width + min(0, right))]
        top, left = max(0, -down), max(0, right) if flip else max(0, -right)
        out[:, top : top + part.shape[1], left : left + part.shape[2]] = part.flip(2) if flip else part
    return result


class CutMix(nn.Module):
    r"""Paste a box of another image of the batch into every image, each with its own box and partner.

    The box covers a uniform share of the image, before the part that sticks out is cut off. Source: Yun et al.,
    "CutMix: regularization strategy to train strong classifiers with localizable features", ICCV 2019
    (arXiv 1905.04899), section 3.1, there with one share and one box for a batch.
    """

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mix images alone, for a use that asks another network about them instead of mixing labels.

        Args:
            images: `(B, C, H, W)`, float.
            generator: source of the boxes and partners, on the images' device.

        Returns:
            `(B, C, H, W)`.
        """
        box, partners = self.boxes(images, generator)
        return torch.where(box, images[partners], images)

    def boxes(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Which pixels come from a partner, `(B, 1, H, W)` bool, and who it is, `(B,)`; arguments as above."""
        check_image_batch("images", images)
        batch, _, height, width = images.shape
        device = images.device
        partners = torch.randperm(batch, generator=generator, device=device)
        shares, *centres = torch.rand((3, batch, 1), generator=generator, device=device)
        half = shares.sqrt() / 2
        rows, columns = (
            ((torch.arange(size, device=device) + 0.5) / size - centre).abs() < half
            for size, centre in zip((height, width), centres, strict=True)
        )
        return rows[:, None, :, None] & columns[:, None, None, :], partners
