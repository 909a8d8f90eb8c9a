"""A small network from images to images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least


class UNet(nn.Module):
    """Images to images of the same size: stages down and up again, each handing its features across.

    Instance normalisation keeps every output a function of its own image. Weights are drawn from ``generator`` alone,
    on its device, in float32.

    Source: Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015 (arXiv
    1505.04597).

    Args:
        image_shape: channels, height and width, of which there are as many halvings as leave 2 pixels, at most four.
        width: channels of the first stage; each further one has twice as many, at most 512.
        generator: of the first weights.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, generator: torch.Generator) -> None:
        check_at_least("width", width, 1)
        super().__init__()
        channels, *sides = image_shape
        depth = min(4, max(0, int(math.log2(min(sides))) - 1))
        widths = [min(512, width * 2**stage) for stage in range(depth + 1)]
        with torch.device("meta"):  # draws nothing from the global generator
            before = [channels, *widths[:-1]]
            self.down = nn.ModuleList(_stage(i, o) for i, o in zip(before, widths, strict=True))
            self.up = nn.ModuleList(_stage(widths[i] + widths[i + 1], widths[i]) for i in reversed(range(depth)))
            self.last = nn.Conv2d(widths[0], channels, 1)
        self.float().to_empty(device=generator.device)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, math.sqrt(5), generator=generator)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.InstanceNorm2d):
                layer.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, H, W)`, of any values."""
        kept: list[Tensor] = []
        features = images
        for index, stage in enumerate(self.down):
            features = stage(F.max_pool2d(features, 2) if index else features)
            kept.append(features)
        kept.pop()
        for stage in self.up:
            across = kept.pop()
            # Nearest neighbours: the gradient of other ways is not the same twice on a GPU.
            features = stage(torch.cat([F.interpolate(features, across.shape[-2:], mode="nearest"), across], dim=1))
        output: Tensor = self.last(features)
        return output


def _stage(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels, affine=True),
        nn.LeakyReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels, affine=True),
        nn.LeakyReLU(),
    )
