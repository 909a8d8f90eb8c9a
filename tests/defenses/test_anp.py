"""ANP against independent formulations."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from nba_lightning import ANP
from nba_lightning.core.randomness import generator_for
from nba_lightning.networks import SmallCNN
from tests.helpers import batch, cross_entropy, lively, normalised_by_hand, norms_of, ready


def scaled(network, masks, deltas, xis):
    """A copy of a network whose BatchNorm weights and biases are changed in place."""
    changed = copy.deepcopy(network)
    norms = norms_of(changed)
    with torch.no_grad():
        for norm, mask, delta, xi in zip(norms, masks, deltas, xis, strict=True):
            norm.weight.mul_(mask + delta)
            norm.bias.mul_(1 + xi)
    return changed


def test_anp_s_loss_is_the_equation_at_the_worst_perturbation(network, trainer):
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    module = ready(ANP(network, epsilon=0.3, alpha=0.25), trainer).eval()
    with torch.no_grad():
        for mask in module.masks:
            mask.uniform_(0.2, 1.0)
    images, labels = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    worst = {}
    find = module._worst
    module._worst = lambda *args: worst.setdefault("noise", find(*args))
    loss = module.training_step((images, labels), 1)
    deltas, xis = worst["noise"]
    zeros = [torch.zeros_like(mask) for mask in module.masks]
    entropies = [
        nn.functional.cross_entropy(scaled(network, module.masks, *noise)(images), labels)
        for noise in ((zeros, zeros), (deltas, xis))
    ]
    torch.testing.assert_close(loss, 0.25 * entropies[0] + 0.75 * entropies[1])
    assert max(float(noise.abs().max()) for noise in (*deltas, *xis)) <= 0.3 + 1e-6
    random = [[(torch.rand_like(mask) * 2 - 1) * 0.3 for mask in module.masks] for _ in range(2)]
    assert entropies[1] > nn.functional.cross_entropy(scaled(network, module.masks, *random)(images), labels)


def test_anp_prunes_what_its_masks_say_and_trains_nothing_else(network, trainer, clean_digits):
    before = copy.deepcopy(network.state_dict())
    module = ANP(network, lr=0.0001, threshold=0.5)
    with torch.no_grad():
        module.masks[1][2] = 0.1
    trainer().fit(module, clean_digits)
    after, norm = network.state_dict(), module.norms[1]
    for name, value in before.items():
        wanted = value.clone()
        if name == f"{norm}.weight":
            wanted[2] = 0.0
        torch.testing.assert_close(after[name], wanted)


def test_bad_arguments_of_anp():
    with pytest.raises(ValueError, match="Expected `model` to be a network with BatchNorm layers that have weights"):
        ANP(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"Expected `alpha` to be in \[0, 1\], but got 2"):
        ANP(SmallCNN(), alpha=2)


def test_anp_leaves_weights_alone_while_it_trains_masks(network, clean_digits, trainer):
    before = {name: value.clone() for name, value in network.named_parameters()}
    module = ANP(network, threshold=0.0)

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())

    trainer(max_epochs=1, callbacks=[Look()]).fit(module, clean_digits)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def forward_by_hand(network, masks, deltas, xis, images):
    """Logits where every BatchNorm is written out, its weight times m + delta and its bias times 1 + xi."""
    norms = norms_of(network)
    weights = [norm.weight.detach() * (m + d) for norm, m, d in zip(norms, masks, deltas, strict=True)]
    biases = [norm.bias.detach() * (1 + xi) for norm, xi in zip(norms, xis, strict=True)]
    return normalised_by_hand(network, images, weights, biases)


@pytest.mark.parametrize("training", [False, True])
def test_anp_s_worst_perturbation_is_signed_ascent_from_a_random_start_within_the_bound(training, network, trainer):
    module = ready(ANP(lively(network), epsilon=0.3, steps=2), trainer).train(training)
    with torch.no_grad():
        for mask in module.masks:
            mask.uniform_(0.2, 1.0)
    (images, labels), count = batch(8), len(module.masks)
    found = module._worst(images, labels, generator_for(7))
    generator = generator_for(7)
    noise = [0.3 * (2 * torch.rand(m.shape, generator=generator) - 1) for m in (*module.masks, *module.masks)]
    for _ in range(2):
        noise = [one.requires_grad_() for one in noise]
        logits = forward_by_hand(copy.deepcopy(network), module.masks, noise[:count], noise[count:], images)
        slopes = torch.autograd.grad(cross_entropy(logits, labels), noise)
        noise = [
            torch.where(slope > 0, one + 0.15, torch.where(slope < 0, one - 0.15, one)).detach().clamp(-0.3, 0.3)
            for one, slope in zip(noise, slopes, strict=True)
        ]
    mine, theirs = (torch.cat([one.flatten() for one in side]) for side in ((*found[0], *found[1]), noise))
    assert float((mine - theirs).abs().gt(1e-5).float().mean()) <= 0.02  # a slope of 0 has no sign


def test_anp_s_gradient_with_respect_to_the_masks_holds_the_perturbation_fixed(network, trainer):
    module = ready(ANP(lively(network), epsilon=0.3, alpha=0.3), trainer).train()
    images, labels = batch(8)
    worst, find = {}, module._worst
    module._worst = lambda *args: worst.setdefault("noise", find(*args))
    statistics = {name: value.clone() for name, value in network.named_buffers()}
    module.training_step((images, labels), 1).backward()
    assert all(torch.equal(value, statistics[name]) for name, value in network.named_buffers())
    masks = [mask.detach().clone().requires_grad_() for mask in module.masks]
    none, alone = [torch.zeros_like(mask) for mask in masks], copy.deepcopy(network)
    clean = cross_entropy(forward_by_hand(alone, masks, none, none, images), labels)
    robust = cross_entropy(forward_by_hand(alone, masks, *worst["noise"], images), labels)
    wanted = torch.autograd.grad(0.3 * clean + 0.7 * robust, masks)
    for mask, gradient in zip(module.masks, wanted, strict=True):
        torch.testing.assert_close(mask.grad, gradient, atol=1e-5, rtol=1e-3)


def test_anp_begins_each_step_at_another_random_place(network, trainer):
    module, drawn = ready(ANP(network), trainer), []
    module._worst = lambda images, labels, generator: (
        drawn.append(torch.rand(4, generator=generator)) or find(images, labels, generator_for(0))
    )
    find = ANP._worst.__get__(module)
    for index in (1, 2, 2):
        module.training_step(batch(), index)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])


def test_anp_prunes_below_the_threshold_and_evaluates_as_pruned(network):
    module = ANP(lively(network), threshold=0.5).eval()
    with torch.no_grad():
        module.masks[0].copy_(torch.tensor([0.5, 0.49, 0.51, 0.0]))
    images = torch.rand(3, 1, 8, 8)
    by_hand, norm = copy.deepcopy(network), copy.deepcopy(network.block1[1])
    with torch.no_grad():
        for channel in (1, 3):  # 0.5 itself stays
            by_hand.block1[1].weight[channel] = 0.0
    torch.testing.assert_close(module(images), by_hand(images))
    assert module.prune() == 2
    torch.testing.assert_close(network(images), by_hand(images))
    assert torch.equal(network.block1[1].weight[[0, 2]], norm.weight[[0, 2]])


def test_anp_s_pruned_network_is_the_equation_with_masks_of_zero_and_one(network):
    """The masks are trained beside the biases as they are, so pruning must keep those of the channels that it takes."""
    module = ANP(lively(network), threshold=0.5).eval()
    with torch.no_grad():
        for mask in module.masks:
            mask.copy_((torch.rand(mask.shape) < 0.5).to(mask.dtype))
    images, before = torch.rand(3, 1, 8, 8), copy.deepcopy(network)
    none = [torch.zeros_like(mask) for mask in module.masks]
    wanted = forward_by_hand(before, module.masks, none, none, images)
    torch.testing.assert_close(module(images), wanted)
    assert module.prune() == sum(int((mask == 0).sum()) for mask in module.masks) > 0
    torch.testing.assert_close(network(images), wanted)


def test_anp_prunes_with_the_last_step_and_not_before(network, clean_digits, trainer):
    module, seen = ANP(lively(network), lr=1e-6, threshold=1.0), []
    with torch.no_grad():
        module.masks[0][1] = 0.5

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(network.block1[1].weight[1].item())

    trainer(max_epochs=1, callbacks=[Look()]).fit(module, clean_digits)
    assert 0.0 not in seen[:-1]
    assert seen[-1] == 0.0


def test_anp_s_masks_stop_at_both_ends_of_the_unit_range(network, clean_digits, trainer):
    module, found = ANP(lively(network), lr=50.0, momentum=0.0), []
    with torch.no_grad():
        for mask in module.masks:
            mask.fill_(0.5)

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            found.append(torch.cat([mask.detach().clone() for mask in module.masks]))

    trainer(callbacks=[Look()]).fit(module, clean_digits)
    assert float(found[0].min()) == 0.0  # the step went far beyond, both ways
    assert float(found[0].max()) == 1.0
    assert all(0.0 <= float(one.min()) <= float(one.max()) <= 1.0 for one in found)
