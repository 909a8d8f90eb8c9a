"""Random crop and flip of whole batches on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.checks import check_at_least, check_image_batch


class RandomCropFlip(nn.Module):
    """Shift every image by its own random offset (zero padding) and mirror half of them.

    The usual CIFAR augmentation (He et al., CVPR 2016, section 4.2), vectorised over the batch.

    Args:
        padding: largest shift in pixels; ``None`` means an eighth of the height (4 at 32 pixels).
        flip: mirror left and right with probability 1/2.
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
            images: `(B, C, H, W)`, float.
            generator: source of the offsets, on the images' device.

        Returns:
            `(B, C, H, W)`.
        """
        check_image_batch("images", images)
        batch, channels, height, width = images.shape
        padding = height // 8 if self.padding is None else self.padding
        device = images.device
        offsets = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator, device=device)
        rows = offsets[0] + torch.arange(height, device=device)
        columns = offsets[1] + torch.arange(width, device=device)
        if self.flip:
            mirrored = torch.rand((batch, 1), generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (padding,) * 4)
        pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(batch, 1, -1)
        return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)
