"""What a folded network computes is what one with the map in front of its layer computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nba_lightning.core.folding import folded_shift, folded_weight, resolve_seam, seams
from nba_lightning.networks import PreActResNet18, SmallCNN, WideResNet
from tests.helpers import lively


def explicit(layer, matrix, shift):
    """The layer with an affine map of its input channels in front of it, behind the padding."""

    def forward(inputs):
        if isinstance(layer, nn.Linear):
            return F.linear(inputs @ matrix.T + shift, layer.weight, layer.bias)
        rows, columns = layer.padding
        padded = F.pad(inputs, (columns, columns, rows, rows))
        mapped = (padded.movedim(1, -1) @ matrix.T + shift).movedim(-1, 1)
        return F.conv2d(mapped, layer.weight, layer.bias, layer.stride, 0, layer.dilation)

    return forward


class Tokens(nn.Module):
    """A transformer in miniature: one convolution, which sees the image, then tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, stride=4)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 10)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.block(tokens)).mean(dim=1))


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: SmallCNN(width=4, in_channels=1), "block3.0"),
        (lambda: WideResNet(10, in_channels=1), "layer2.0.conv1"),
        (Tokens, "block.1"),
        (Tokens, "embed"),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 3, (2, 1), (2, 1), 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)), "0"),
    ],
)
def test_a_folded_network_is_the_one_with_the_map(make, layer):
    torch.manual_seed(0)
    network, images = lively(make()).eval(), torch.rand(5, 1, 8, 8)
    network(images)  # a lazy layer learns its size
    seam, by_hand = resolve_seam(network, layer), copy.deepcopy(network)
    weight = network.get_parameter(seam.weight)
    channels = weight.shape[1]
    matrix, shift = torch.eye(channels) + 0.3 * torch.randn(channels, channels), torch.randn(channels)
    changed = by_hand.get_submodule(layer)
    changed.forward = explicit(copy.deepcopy(changed), matrix, shift)
    wanted = by_hand(images)
    assert not torch.allclose(wanted, network(images), atol=1e-2)
    seam.check(network, images)
    bias = network.get_parameter(seam.bias)
    with torch.no_grad():
        bias.copy_(seam.shifted(network, bias, folded_shift(weight, shift)))
        weight.copy_(folded_weight(weight, matrix))
    torch.testing.assert_close(network(images), wanted, atol=1e-4, rtol=1e-4)


def test_the_last_convolution_that_will_do_is_taken():
    # That of the authors of NPD: the last one of PreActResNet-18 has neither a bias nor a BatchNorm of its own.
    assert resolve_seam(PreActResNet18(), None).layer == "layer4.1.conv1"
    assert resolve_seam(PreActResNet18(), None).bias == "layer4.1.bn2.bias"
    assert resolve_seam(SmallCNN(), None).weight == "block3.0.weight"
    assert "layer4.1.conv2" not in seams(PreActResNet18())
    assert seams(Tokens()).keys() == {"embed", "block.1", "block.3", "head"}
    late = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 3), nn.Flatten())
    assert list(seams(late)) == ["0.0", "0.1", "1"]  # a parent's own layers may come behind those of its children
    assert resolve_seam(Tokens(), "block.1").bias == "block.1.bias"


def test_layers_into_which_nothing_can_be_folded_are_refused_with_those_that_will_do():
    with pytest.raises(ValueError, match=r"Expected `layer` to be a convolution.*layer4\.1\.conv1.*but got 'layer4"):
        resolve_seam(PreActResNet18(), "layer4.1.conv2")
    with pytest.raises(ValueError, match=r"named for Tokens, as one of embed, block\.1, block\.3, head, but got None"):
        resolve_seam(Tokens(), None)
    grouped = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 4, 3, groups=2), nn.Flatten())
    with pytest.raises(ValueError, match="but got '2'"):
        resolve_seam(grouped, "2")
    free = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 3, bias=False), nn.Flatten())
    with pytest.raises(ValueError, match="of which Sequential has none"):
        resolve_seam(free, None)


def test_a_batchnorm_that_others_bypass_takes_up_no_shift():
    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3)
            self.conv = nn.Conv2d(4, 4, 3, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 3)

        def forward(self, images):
            found = self.conv(self.first(images))
            return self.fc((self.norm(found) + found).mean(dim=(2, 3)))

    network = lively(Bypassed()).eval()
    seam = resolve_seam(network, "conv")
    with pytest.raises(ValueError, match=r"only 'norm' sees, such as first, fc, but got 'conv'"):
        seam.check(network, torch.rand(2, 1, 8, 8))
    assert not network.conv._forward_hooks
