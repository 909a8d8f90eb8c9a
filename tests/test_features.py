import pytest
import torch
from torch import nn

from nba_lightning.core.features import capture, changed, features
from nba_lightning.core.layers import resolve_layers
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


class Residual(nn.Module):
    def __init__(self, behind):
        super().__init__()
        self.conv, self.behind, self.unused = nn.Conv2d(3, 4, 3, bias=False), behind, nn.Identity()
        self.flag = False

    def forward(self, images):
        maps = self.conv(images)
        if self.flag:
            maps -= 1
        return self.behind(maps).mean(dim=(2, 3))


class Add(nn.Module):
    def forward(self, maps):
        maps += 1
        return maps


@pytest.mark.parametrize("behind", [nn.ReLU(inplace=True), Add(), nn.ReLU(), nn.Dropout(0.5, inplace=True)])
@pytest.mark.parametrize("training", [False, True])
def test_features_are_a_layer_s_own_output_whatever_follows(behind, training):
    network, images = Residual(behind).train(training), torch.rand(2, 3, 6, 6)
    for _ in range(3):
        observed = features(network, images, ["conv"])[1]["conv"]
        assert torch.equal(observed, network.conv(images))
        weight = network.conv.weight
        gradient = torch.autograd.grad(observed.square().sum(), weight)[0]
        wanted = torch.autograd.grad(network.conv(images).square().sum(), weight)[0]
        torch.testing.assert_close(gradient, wanted)
    with torch.inference_mode():
        assert torch.equal(features(network, images, ["conv"])[1]["conv"], network.conv(images))


@pytest.mark.parametrize(("behind", "copied"), [(nn.ReLU(inplace=True), True), (nn.ReLU(), False)])
def test_features_are_copied_only_where_they_must_be(behind, copied):
    network, outputs = Residual(behind), []
    network.conv.register_forward_hook(lambda module, args, output: outputs.append(output))
    for _ in range(2):
        observed = features(network, torch.rand(2, 3, 6, 6), ["conv"])[1]["conv"]
    assert (observed is not outputs[-1]) == copied


def test_features_that_are_overwritten_for_the_first_time_are_told():
    network, images = Residual(nn.ReLU()), torch.rand(2, 3, 6, 6)
    features(network, images, ["conv"])
    network.flag = True
    with pytest.raises(RuntimeError, match="features of layer 'conv' were changed in place"):
        features(network, images, ["conv"])
    assert torch.equal(features(network, images, ["conv"])[1]["conv"], network.conv(images))


def test_a_layer_that_the_forward_pass_skips_is_named():
    with pytest.raises(ValueError, match="layers that the network's forward pass calls, but got 'unused', which it sk"):
        features(Residual(nn.ReLU()), torch.rand(2, 3, 6, 6), ["conv", "unused"])


class Pair(nn.Module):
    """A layer that returns its output within something else."""

    def __init__(self, wrap, unwrap):
        super().__init__()
        self.inner = nn.Module()
        self.inner.forward = wrap
        self.unwrap = unwrap

    def forward(self, images):
        return self.unwrap(self.inner(images)).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: (x, 7), lambda out: out[0] * (out[1] / 7)),
        (lambda x: [x, 7], lambda out: out[0] * (out[1] / 7)),
        (lambda x: {"maps": x, "more": 7}, lambda out: out["maps"] * (out["more"] / 7)),
    ],
)
def test_features_are_changed_within_whatever_a_layer_returns(wrap, unwrap):
    network, images = Pair(wrap, unwrap), torch.rand(2, 3, 4, 4)
    with changed(network, "inner", lambda maps: maps + 1):
        torch.testing.assert_close(network(images), images.mean(dim=(2, 3)) + 1)
    assert torch.equal(network(images), images.mean(dim=(2, 3)))


def test_features_are_as_before_after_an_error(network):
    images = torch.rand(2, 1, 8, 8)
    before = network.eval()(images)
    with pytest.raises(ZeroDivisionError), changed(network, "block1", lambda maps: maps + 1 / 0):
        network(images)
    assert torch.equal(network(images), before)
