import pytest
import torch
from torch import nn

from nba_lightning.core.features import capture, features, resolve_layers
from nba_lightning.networks import PreActResNet18, SmallCNN, WideResNet


def test_features_equal_a_forward_by_hand_and_hooks_are_gone(network):
    network.eval()
    images = torch.rand(2, 1, 8, 8)
    logits, observed = features(network, images, ["block1", "block2"])
    first = network.block1(network.normalize(images))
    torch.testing.assert_close(observed["block1"], first)
    assert list(observed) == ["block1", "block2"]
    torch.testing.assert_close(logits, network(images))
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_are_gone_after_an_error(network):
    with pytest.raises(ValueError, match="channels"), capture(network, ["block1"]):
        network(torch.rand(2, 3, 8, 8))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("shipped", [SmallCNN(4), WideResNet(10, 1), PreActResNet18()])
def test_shipped_networks_have_default_layers(shipped):
    layers = resolve_layers(shipped, None)
    logits, observed = features(shipped, torch.rand(2, 3, 32, 32), layers)
    assert logits.shape == (2, 10)
    assert len(observed) >= 3
    assert all(value.ndim == 4 for value in observed.values())


def test_unknown_layers_and_missing_defaults_list_what_there_is(network):
    with pytest.raises(ValueError, match="got blok1. Available: normalize, block1"):
        resolve_layers(network, ["blok1"])
    with pytest.raises(ValueError, match="has no default.*Available: 0, 1"):
        resolve_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), None)
    with pytest.raises(ValueError, match="at least one layer"):
        resolve_layers(network, [])
