"""Reference networks from images in [0, 1] to logits; normalisation is their first layer."""

from nba_lightning.networks.normalize import Normalize
from nba_lightning.networks.preact_resnet import PreActResNet, PreActResNet18, WideResNet
from nba_lightning.networks.small_cnn import SmallCNN

__all__ = ["Normalize", "PreActResNet", "PreActResNet18", "SmallCNN", "WideResNet"]
