"""SAU against independent formulations."""

import math

import pytest
import torch
from torch import nn

from nba_lightning import SAU
from nba_lightning.defenses.sau import unlearning_loss
from nba_lightning.networks import SmallCNN
from tests.helpers import Spy, batch, cross_entropy, drifted, lively, ready, small


def test_sau_s_unlearning_loss_image_by_image():
    logits, answers = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
    fooled = torch.tensor([True, False, True, True])
    total = 0.0
    for one, answer, counts in zip(logits, answers, fooled, strict=True):
        if counts:
            others = [math.exp(one[k]) for k in range(3) if k != answer]
            total -= math.log(sum(others) / (sum(others) + math.exp(one[answer])))
    assert unlearning_loss(logits, answers, fooled).item() == pytest.approx(total / 4, rel=1e-4)
    certain = torch.tensor([[-20.0, 20.0]], requires_grad=True)
    unlearning_loss(certain, torch.tensor([0]), torch.tensor([True])).backward()
    assert (certain.grad == 0).all()  # forgotten is forgotten


def test_sau_s_perturbations_fool_both_networks_alike(trainer):
    torch.manual_seed(0)
    module = ready(SAU(SmallCNN(width=8, in_channels=1), epsilon=0.5, step_size=0.1, steps=20), trainer).eval()
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    images, labels = torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,))
    before = [network(images).argmax(dim=1) for network in (module.model, module.suspicious)]
    perturbations = module.craft(images, labels, before)
    assert perturbations.abs().max() <= 0.5 + 1e-6

    def both_wrong(shift):
        new = [network(images + shift).argmax(1) for network in (module.model, module.suspicious)]
        return ((new[0] == new[1]) & (new[0] != before[0]) & (new[1] != before[1])).float().mean()

    noise = 0.5 * torch.randn_like(images).sign()
    assert both_wrong(perturbations) > both_wrong(noise)
    logits = [network(images + noise) for network in (module.model, module.suspicious)]
    wanted = 0.0
    for i in range(32):  # one image at a time
        answers = [one[i].argmax() for one in logits]
        done = [answer != old[i] for answer, old in zip(answers, before, strict=True)]
        for one, stop in zip(logits, done, strict=True):
            wanted -= 0.0 if stop else 0.01 / 2 * nn.functional.cross_entropy(one[i : i + 1], labels[i : i + 1])
        if not (done[0] and done[1] and answers[0] == answers[1]):
            p, q = (one[i].softmax(dim=0) for one in logits)
            m = (p + q) / 2
            wanted += ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    torch.testing.assert_close(module._crafting_loss(logits, before, labels), wanted / 32)


def test_sau_leaves_batchnorm_statistics_alone_and_uses_adam(network, trainer, clean_digits):
    before = {name: value.clone() for name, value in network.named_buffers()}
    module = SAU(network, steps=1)
    trainer().fit(module, clean_digits)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert isinstance(module.optimizers(use_pl_optimizer=False), torch.optim.Adam)
    with pytest.raises(ValueError, match="Expected `unlearning` to be at least 0, but got -1"):
        SAU(network, unlearning=-1)


def crafting_loss_by_hand(networks, images, shift, before, labels):
    """Image by image: -0.01 / 2 (CE + CE) + JS, each as long as its aim is not reached."""
    logits, total = [network(images + shift) for network in networks], 0.0
    for i in range(len(images)):
        answers = [int(one[i].argmax()) for one in logits]
        done = [answer != int(old[i]) for answer, old in zip(answers, before, strict=True)]
        p, q = (one[i].softmax(dim=0) for one in logits)
        for probabilities, stop in ((p, done[0]), (q, done[1])):
            total = total + (0.0 if stop else 0.01 / 2 * probabilities[labels[i]].log())
        if not (all(done) and answers[0] == answers[1]):
            m = (p + q) / 2
            total = total + ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    return total / len(images)


def sau(trainer, **kwargs):
    """With a suspicious network that the network has left behind."""
    module = ready(SAU(lively(small()), **kwargs), trainer).train()
    module.model.load_state_dict(drifted(module.model, 0.2).state_dict())
    return module


def test_sau_s_perturbations_are_signed_descent_from_plus_epsilon_within_the_bound(trainer):
    module = sau(trainer, epsilon=0.25, step_size=0.1, steps=3)
    networks, (images, labels) = (module.model, module.suspicious.network), batch(8)
    before = [network(images).argmax(dim=1) for network in networks]
    shift = torch.full_like(images, 0.25)
    for _ in range(3):
        shift.requires_grad_()
        slope = torch.autograd.grad(crafting_loss_by_hand(networks, images, shift, before, labels), shift)[0]
        shift = (shift - 0.1 * slope.sign()).detach().clamp(-0.25, 0.25)
    found = module.craft(images, labels, before)
    assert float((found - shift).abs().gt(1e-5).float().mean()) <= 0.02
    values = [crafting_loss_by_hand(networks, images, d, before, labels) for d in (found, torch.full_like(found, 0.25))]
    assert values[0] < values[1]


def test_sau_s_loss_is_the_equation(trainer):
    module = sau(trainer, unlearning=3.0)
    network, suspicious, (images, labels) = module.model, module.suspicious.network, batch(24)
    shift, crafted_with = torch.randn_like(images), []
    module.craft = lambda *args: crafted_with.append(args) or shift
    loss = module.training_step((images, labels), 1)
    expected, fooled = cross_entropy(network(images), labels), 0
    for i in range(24):
        was, answer = (int(suspicious(one[i : i + 1]).argmax()) for one in (images, images + shift))
        if answer not in (int(labels[i]), was):
            p = network((images + shift)[i : i + 1]).softmax(dim=1)[0, answer]
            expected, fooled = expected - 3.0 * (1 - p).log() / 24, fooled + 1
    assert 0 < fooled < 24
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    (given, truths, before), *_ = crafted_with
    assert torch.equal(given, images)
    assert torch.equal(truths, labels)
    for found, one in zip(before, (network, suspicious), strict=True):
        assert torch.equal(found, one(images).argmax(dim=1))
    module.craft = SAU.craft.__get__(module)
    module.unlearning = 0.0
    torch.testing.assert_close(module.training_step((images, labels), 1), cross_entropy(network(images), labels))


def test_sau_crafts_in_eval_mode_and_its_gradient_reaches_the_network_alone(trainer):
    module = ready(SAU(Spy(lively(small()))), trainer)
    module.model.train()
    images, labels = batch()
    module.craft(images, labels, [labels, labels])
    assert module.model.modes == module.suspicious.network.modes == [{False}] * 5
    assert module.model.net.training
    module.train().training_step((images, labels), 1).backward()
    assert not any(True in modes for modes in module.model.modes)
    assert all(parameter.grad is not None for parameter in module.model.parameters())
    assert all(parameter.grad is None for parameter in module.suspicious.network.parameters())
