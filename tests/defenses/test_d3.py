"""D3 against independent formulations."""

import copy

import pytest
import torch

from nba_lightning import D3
from nba_lightning.core.randomness import generator_for
from tests.defenses.test_fst import constant, fitted, steps_by_hand
from tests.helpers import batch, lively, small


@pytest.mark.parametrize(("penalty", "divisor"), [(0.5, 1), (3.0, 4)])
def test_d3_s_steps_are_the_equation(penalty, divisor, trainer):
    network, batches = lively(small()), [batch(8) for _ in range(3)]
    initial = network.fc.weight.detach().clone()
    length = sum(float(one) ** 2 for one in initial.flatten()) ** 0.5
    by_hand = copy.deepcopy(network).train()
    with torch.no_grad():
        drawn = torch.rand(10, 16, generator=generator_for(3, 10)) - 0.5
        by_hand.fc.weight.copy_(drawn / drawn.square().sum() ** 0.5 * length)
    spared = 0

    def loss(logits, labels, weight):
        nonlocal spared
        total = 0.0
        for one, label in zip(logits, labels, strict=True):
            entropy = one.exp().sum().log() - one[label]
            if entropy > 2.2:
                total = total + entropy - 2.2
            else:
                spared += 1
        squares = sum((new - float(old)) ** 2 for new, old in zip(weight.flatten(), initial.flatten(), strict=True))
        return (penalty / 8 * total - squares**0.5) / divisor

    steps_by_hand(by_hand, batches, initial, loss, lr=0.05)
    assert 0 < spared < 24
    fitted(D3(network, penalty=penalty, tolerance=2.2, lr=0.05, seed=3, scheduler=constant), trainer, batches)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_d3_leaves_to_the_other_side_where_the_loss_does_not_count(trainer):
    network, batches = small(), [batch(4) for _ in range(60)]
    initial, bias = network.fc.weight.detach().clone(), network.fc.bias.detach().clone()
    fitted(D3(network, tolerance=100.0, lr=0.5), trainer, batches)
    torch.testing.assert_close(network.fc.weight.detach(), -initial, atol=0.02, rtol=0)  # the farthest of that norm
    assert torch.equal(network.fc.bias, bias)  # neither drawn nor moved


def test_bad_arguments_of_d3():
    for name in ("penalty", "tolerance"):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be at least 0, but got -1"):
            D3(small(), **{name: -1})
