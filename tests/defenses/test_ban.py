"""BAN against independent formulations."""

import copy

import pytest
import torch
from torch import nn

from nba_lightning import BAN
from nba_lightning.core.randomness import generator_for
from tests.helpers import batch, cross_entropy, lively, normalised_by_hand, norms_of, ready


def forward_by_hand(network, noise, images):
    """Logits where every BatchNorm is written out, its weight and its bias times 1 + noise."""
    norms = norms_of(network)
    weights = [norm.weight * (1 + delta) for norm, delta in zip(norms, noise[::2], strict=True)]
    biases = [norm.bias * (1 + xi) for norm, xi in zip(norms, noise[1::2], strict=True)]
    return normalised_by_hand(network, images, weights, biases)


@pytest.mark.parametrize("training", [False, True])
def test_ban_s_loss_is_the_equation_and_its_gradient_holds_the_noise_fixed(training, network, trainer):
    module = ready(BAN(lively(network), epsilon=0.2, robust=0.25), trainer).train(training)
    (images, labels), alone = batch(8), copy.deepcopy(network)
    found, find = {}, module._worst
    module._worst = lambda *args: found.setdefault("noise", find(*args))
    loss = module.training_step((images, labels), 1)
    loss.backward()
    wanted = cross_entropy(alone(images), labels)
    wanted = wanted + 0.25 * cross_entropy(forward_by_hand(alone, found["noise"], images), labels)
    torch.testing.assert_close(loss, wanted)
    slopes = torch.autograd.grad(wanted, list(alone.parameters()))
    for parameter, slope in zip(network.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_ban_s_noise_is_signed_ascent_from_a_random_start_and_is_not_brought_back(steps, network, trainer):
    module = ready(BAN(lively(network), epsilon=0.3, steps=steps), trainer).eval()
    images, labels = batch(8)
    found, generator = module._worst(images, labels, generator_for(7)), generator_for(7)
    channels = [len(m.weight) for m in network.modules() if isinstance(m, nn.BatchNorm2d) for _ in range(2)]
    start = [0.3 * (2 * torch.rand(number, generator=generator) - 1) for number in channels]
    noise = start
    for _ in range(steps):
        noise = [one.requires_grad_() for one in noise]
        slopes = torch.autograd.grad(cross_entropy(forward_by_hand(network, noise, images), labels), noise)
        noise = [(one + 0.3 / steps * slope.sign()).detach() for one, slope in zip(noise, slopes, strict=True)]
    mine, theirs, first = (torch.cat(side) for side in (found, noise, start))
    assert float((mine - theirs).abs().gt(1e-5).float().mean()) <= 0.02  # a slope of 0 has no sign
    assert 0.3 < float(mine.abs().max()) <= 0.6 + 1e-6
    losses = [cross_entropy(forward_by_hand(network, one, images), labels) for one in (found, start)]
    assert losses[0] > losses[1]
    assert 0.05 < float(first.detach().abs().mean()) < 0.25


def test_ban_begins_each_step_at_another_random_place(network, trainer):
    module, drawn = ready(BAN(network), trainer), []
    find = module._worst
    module._worst = lambda images, labels, generator: (
        drawn.append(torch.rand(4, generator=generator)) or find(images, labels, generator_for(0))
    )
    for index in (1, 2, 2):
        module.training_step(batch(), index)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])


def test_ban_s_noise_leaves_no_trace_but_statistics_which_learn_from_each_pass(network, trainer):
    module = ready(BAN(lively(network), steps=2), trainer).train()
    before = copy.deepcopy(network.state_dict())
    module.training_step(batch(8), 1)
    for name, value in network.state_dict().items():
        assert ("running" in name or "tracked" in name) or torch.equal(value, before[name])
    assert int(network.block1[1].num_batches_tracked) == 4  # two steps, the loss under noise, the loss without


def test_ban_s_weights_keep_their_right_to_train(network, clean_digits, trainer):
    before = {name: value.clone() for name, value in network.named_parameters()}
    trainer().fit(BAN(network), clean_digits)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(torch.equal(value, before[name]) for name, value in network.named_parameters())


@pytest.mark.parametrize("other", [nn.Identity, lambda: nn.GroupNorm(2, 4), lambda: nn.BatchNorm2d(4, affine=False)])
def test_ban_needs_batchnorm_with_weights(other):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), other(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="Expected `model` to be a network with BatchNorm layers that have weights"):
        BAN(plain)


def test_bad_arguments_of_ban(network):
    with pytest.raises(ValueError, match="Expected `steps` to be at least 1, but got 0"):
        BAN(network, steps=0)
    with pytest.raises(ValueError, match="Expected `robust` to be at least 0, but got -1"):
        BAN(network, robust=-1)
    with pytest.raises(ValueError, match=r"Expected `epsilon` to be in \[0, inf\], but got -0.1"):
        BAN(network, epsilon=-0.1)
