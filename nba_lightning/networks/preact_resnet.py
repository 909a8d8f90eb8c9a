"""Residual networks with pre-activation blocks: PreActResNet-18 and WideResNet."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, expected
from nba_lightning.networks.normalize import Normalize


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, beside a shortcut (He et al., 2016, arXiv 1603.05027, figure 1b)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(B, C, H, W)` to features."""
        out: Tensor = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *(PreActBlock(in_channels if i == 0 else channels, channels, stride if i == 0 else 1) for i in range(blocks))
    )


class PreActResNet(nn.Module):
    """Pre-activation ResNet for small images.

    Source: He et al., "Identity mappings in deep residual networks", ECCV 2016 (arXiv 1603.05027).

    Args:
        widths: channels of the stages; each stage but the first halves the resolution.
        blocks: blocks of each stage.
        stem: channels of the first convolution.
        num_classes: number of classes K.
        in_channels: channels of the images.
        mean: of the images, in units of [0, 1].
        std: of the images, in units of [0, 1].
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem: int,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.25,
    ) -> None:
        super().__init__()
        check_at_least("num_classes", num_classes, 2)
        check_at_least("in_channels", in_channels, 1)
        self.normalize = Normalize(mean, std, in_channels)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        channels = stem
        self.feature_layers = []
        for i, (width, depth) in enumerate(zip(widths, blocks, strict=True), start=1):
            self.add_module(f"layer{i}", _stage(channels, width, depth, stride=1 if i == 1 else 2))
            self.feature_layers.append(f"layer{i}")
            channels = width
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [0, 1] to logits `(B, K)`."""
        x = self.conv1(self.normalize(images))
        for name in self.feature_layers:
            x = self.get_submodule(name)(x)
        x = F.relu(self.bn(x)).mean(dim=(2, 3))
        logits: Tensor = self.fc(x)
        return logits


class PreActResNet18(PreActResNet):
    """PreActResNet-18: 11.2 million parameters, stages of 64, 128, 256 and 512 channels, two blocks each.

    Args:
        num_classes: number of classes K.
        in_channels: channels of the images.
        mean: of the images, in units of [0, 1].
        std: of the images, in units of [0, 1].
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.25,
    ) -> None:
        super().__init__((64, 128, 256, 512), (2, 2, 2, 2), 64, num_classes, in_channels, mean, std)


class WideResNet(PreActResNet):
    """WideResNet-depth-width without dropout.

    Source: Zagoruyko & Komodakis, "Wide residual networks", BMVC 2016 (arXiv 1605.07146), section 2.

    Args:
        depth: 6 n + 4 for n blocks in each of the three stages.
        width: multiplies the stages' 16, 32 and 64 channels.
        num_classes: number of classes K.
        in_channels: channels of the images.
        mean: of the images, in units of [0, 1].
        std: of the images, in units of [0, 1].
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 1,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.25,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise expected("depth", "6 n + 4 with n at least 1 (10, 16, 22, 28, 34, 40, ...)", depth)
        check_at_least("width", width, 1)
        widths = (16 * width, 32 * width, 64 * width)
        super().__init__(widths, ((depth - 4) // 6,) * 3, 16, num_classes, in_channels, mean, std)
