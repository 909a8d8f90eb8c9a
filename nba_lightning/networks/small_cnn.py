"""A small convolutional network for images of 8x8 to 32x32 pixels."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least
from nba_lightning.networks.normalize import Normalize


class SmallCNN(nn.Module):
    """Three convolutions with BatchNorm and ReLU, pooled between, then one linear layer.

    Args:
        width: channels of the first convolution; the next ones have twice and four times as many.
        num_classes: number of classes K.
        in_channels: channels of the images.
        mean: of the images, in units of [0, 1].
        std: of the images, in units of [0, 1].
    """

    feature_layers = ("block1", "block2", "block3")

    def __init__(
        self,
        width: int = 16,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.25,
    ) -> None:
        super().__init__()
        check_at_least("width", width, 1)
        check_at_least("num_classes", num_classes, 2)
        check_at_least("in_channels", in_channels, 1)
        self.normalize = Normalize(mean, std, in_channels)
        self.block1 = _block(in_channels, width)
        self.block2 = _block(width, 2 * width)
        self.block3 = _block(2 * width, 4 * width)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [0, 1] to logits `(B, K)`."""
        x = F.max_pool2d(self.block1(self.normalize(images)), 2)
        x = F.max_pool2d(self.block2(x), 2)
        logits: Tensor = self.fc(self.block3(x).mean(dim=(2, 3)))
        return logits


def _block(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
