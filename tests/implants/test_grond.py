"""Grond: its perturbation and its levelled channels against loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nba_lightning import BackdoorDataModule, Classifier, GrondTraining
from nba_lightning.attacks import BadNets, Grond
from nba_lightning.core.lipschitz import channel_lipschitz, level_channels, normalized_convolutions
from nba_lightning.core.randomness import shuffled
from nba_lightning.networks import SmallCNN, WideResNet
from tests.attack_zoo import TinySet, compute
from tests.helpers import lively
from tests.test_modules import states_equal
from tests.test_resuming import check


def by_loop(convolution, norm):
    """Channel by channel, as the authors write it."""
    bounds = []
    for index in range(len(norm.weight)):
        matrix = convolution.weight[index].reshape(convolution.weight.shape[1], -1)
        matrix = matrix * (norm.weight[index] / (norm.running_var[index] + norm.eps).sqrt()).abs()
        bounds.append(torch.linalg.svdvals(matrix.double()).max())
    return torch.stack(bounds).float()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_channel_s_bound_is_its_largest_singular_value(groups):
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6)
    lively(norm)
    norm.weight.data[0] *= -1
    torch.testing.assert_close(channel_lipschitz(convolution, norm), by_loop(convolution, norm).detach())


def test_each_norm_goes_with_the_last_convolution_of_as_many_channels():
    network = WideResNet(10, 1)
    names = {id(module): name for name, module in network.named_modules()}
    pairs = {names[id(norm)]: names[id(convolution)] for convolution, norm in normalized_convolutions(network)}
    assert pairs["layer1.0.bn1"] == "conv1"
    assert pairs["layer1.0.bn2"] == "layer1.0.conv1"
    assert pairs["layer2.0.bn2"] == "layer2.0.conv1"
    assert pairs["bn"] == "layer3.0.shortcut"
    odd = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(3, affine=False))
    assert normalized_convolutions(odd) == []


def test_outliers_get_their_layer_s_mean_weight_and_bias_and_no_other_channel_changes():
    torch.manual_seed(0)
    network = lively(nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16)))
    norm = network[1]
    norm.weight.data[3] = 30.0
    before, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    bounds = by_loop(*network).detach()
    gone = bounds > bounds.mean() + 3 * bounds.std()
    assert gone.nonzero().flatten().tolist() == [3]
    level_channels(network, 3.0)
    assert norm.weight[3] == before.mean()  # with its own in it
    assert norm.bias[3] == bias.mean()
    assert torch.equal(norm.weight[~gone], before[~gone])
    assert torch.equal(norm.bias[~gone], bias[~gone])


def test_channels_are_levelled_between_epochs_but_not_behind_the_last(trainer):
    calls = []

    class Look(GrondTraining):
        def on_train_batch_start(self, batch, batch_idx):
            before = copy.deepcopy(self.model.state_dict())
            super().on_train_batch_start(batch, batch_idx)
            if not states_equal(before, self.model.state_dict()):
                calls.append((self.trainer.current_epoch, batch_idx))

    torch.manual_seed(0)
    module = Look(SmallCNN(width=8, in_channels=1), u=0.5)
    trainer(max_epochs=3).fit(module, BackdoorDataModule(attack=BadNets(), batch_size=256))
    assert calls == [(1, 0), (2, 0)]


def test_without_outliers_it_is_plain_training(network, trainer):
    states = []
    for make in (Classifier, lambda net: GrondTraining(net, u=100.0)):
        module = make(copy.deepcopy(network))
        trainer(max_epochs=2).fit(module, BackdoorDataModule(attack=BadNets(), batch_size=256))
        states.append(module.model.state_dict())
    assert states_equal(*states)
    with pytest.raises(ValueError, match="Expected `u` to be at least 0, but got -1"):
        GrondTraining(network, u=-1)


def test_it_goes_on_within_an_epoch(network, trainer, tmp_path):
    def poisoned():
        return BackdoorDataModule(attack=BadNets(), batch_size=256)

    check(lambda: GrondTraining(copy.deepcopy(network), u=0.5), poisoned, trainer, tmp_path, [5, 6], max_epochs=2)


def test_the_perturbation_is_that_of_signed_steps_from_zero():
    torch.manual_seed(1)
    surrogate, data = SmallCNN(width=4, in_channels=1).eval(), TinySet((1, 8, 8), 40)
    attack = Grond(surrogate, epsilon=0.05, steps=3, target=2)
    attack.prepare((1, 8, 8), 10)
    compute(attack, data)
    delta = torch.zeros(1, 8, 8)
    for step in range(3):  # 30 images are one batch
        images = data.images[torch.arange(30)[shuffled(30, 0, step)]].float() / 255
        leaf = delta.clone().requires_grad_()
        loss = F.cross_entropy(surrogate((images + leaf).clamp(0, 1)), torch.full((30,), 2))
        delta = (delta - 0.01 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(-0.05, 0.05)
    torch.testing.assert_close(attack.delta, delta)
    assert attack.delta.abs().max() <= 0.05
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(attack(images), (images + delta).clamp(0, 1))


def test_the_perturbation_sees_the_attacker_s_images_alone_and_stays_in_its_bound():
    read = []

    class Watched(TinySet):
        def read(self, indices):
            read.append(indices)
            return super().read(indices)

    attack = Grond(SmallCNN(width=4, in_channels=1), steps=9, target=2)
    attack.prepare((1, 8, 8), 10)
    compute(attack, Watched((1, 8, 8), 600))
    assert sorted(torch.cat(read[:3]).tolist()) == list(range(590))  # a pass over all, without the defender's
    assert attack.delta.abs().max() == pytest.approx(8 / 255)
    assert attack.eligible(torch.tensor([1, 2, 2])).tolist() == [False, True, True]
