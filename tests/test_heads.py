"""The last linear layer is found in any network, or its absence is named."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18, squeezenet1_0

from nba_lightning.core.heads import check_head, find_head
from nba_lightning.io.adapters import Normalized


class Auxiliary(nn.Module):
    """Registers another linear layer behind the last one, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(6, 3)
        self.side = nn.Linear(4, 6)
        self.unused = nn.Linear(6, 3)

    def forward(self, images):
        return {"logits": self.classifier(self.side(images.flatten(1)).relu())}


@pytest.mark.parametrize(
    ("network", "path"),
    [
        (resnet18(num_classes=5), "fc"),
        (mobilenet_v3_small(num_classes=5), "classifier.3"),
        (timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5), "head"),
        (Normalized(timm.create_model("convnext_atto", num_classes=5), [0.5], [0.5]), "network.head.fc"),
    ],
)
def test_heads_of_strangers(network, path):
    modes = [module.training for module in network.modules()]
    assert find_head(network, torch.rand(2, 3, 32, 32)) == path
    assert [module.training for module in network.modules()] == modes


def test_the_head_is_the_layer_that_gives_the_logits_not_the_last_registered():
    network, images = Auxiliary(), torch.rand(2, 1, 2, 2)
    assert find_head(network, images) == find_head(network, images, "classifier") == "classifier"
    assert find_head(nn.Linear(2, 3), images) == ""
    with pytest.raises(ValueError, match="`head` to be the linear layer whose output is the network's, but got 'side'"):
        find_head(network, images, "side")
    with pytest.raises(ValueError, match=r"path of a linear layer, but got 'fc'. There are: classifier, side, unused"):
        check_head(network, "fc")


def test_a_network_without_a_linear_head_is_named():
    network = squeezenet1_0(num_classes=5)
    with pytest.raises(ValueError, match="Expected `model` to be a network with a linear layer, but got SqueezeNet"):
        check_head(network, None, "model")
    with pytest.raises(ValueError, match="`network` to be one that ends in a linear layer, but got SqueezeNet"):
        find_head(network, torch.rand(2, 3, 64, 64))
    scaled = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="`model` to be one that ends in .* Sequential, whose output is not that of 1"):
        find_head(scaled, torch.rand(2, 1, 2, 2), argument="model")
