"""FT-SAM against independent formulations."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import FTSAM
from nba_lightning.training.sharpness import step_up
from tests.helpers import Spy, batch, cross_entropy, ready


def test_the_adaptive_step_by_hand():
    weights = [torch.tensor([3.0, -1.0]), torch.tensor([2.0])]
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([0.0])]
    first, second = step_up(weights, gradients, rho=2.0)
    norm = (3.0**2 + 2.0**2) ** 0.5  # of |w| g = (3, 2, 0)
    torch.testing.assert_close(first, torch.tensor([2 * 9 / norm, 2 * 2 / norm]))
    assert second.item() == 0.0
    scaled = step_up(weights, [1000 * g for g in gradients], rho=2.0)
    torch.testing.assert_close(scaled[0], first)


def test_ft_sam_steps_along_the_gradient_at_the_moved_weights(trainer):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.rand(6, 1, 2, 2), torch.randint(0, 3, (6,))
    module = ready(FTSAM(copy.deepcopy(network), rho=0.5, label_smoothing=0.1), trainer)
    module.training_step((images, labels), 1).backward()
    moved = [p.clone() for p in module.model.parameters()]
    module.on_after_backward()
    linear = network[1]
    loss = nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1)
    gradients = torch.autograd.grad(loss, [linear.weight, linear.bias])
    norm = sum((w.abs() * g).pow(2).sum() for w, g in zip(network.parameters(), gradients, strict=True)).sqrt()
    with torch.no_grad():
        for weight, gradient in zip(network.parameters(), gradients, strict=True):
            weight.add_(0.5 * weight**2 * gradient / norm)
    nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1).backward()
    for mine, theirs, was in zip(module.model.parameters(), network.parameters(), moved, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        torch.testing.assert_close(was, theirs)
        assert not torch.equal(mine, theirs)  # moved back


def test_ft_sam_s_second_pass_sees_the_moved_weights_under_autocast(network, trainer):
    images, labels = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    losses = []
    for rho in (0.0, 5.0):
        module = ready(FTSAM(copy.deepcopy(network), rho=rho), trainer).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # keeps half-precision copies of weights for one context
            losses.append(module.training_step((images, labels), 1).item())
    assert losses[1] > losses[0] + 0.05


def test_ft_sam_leaves_the_statistics_of_the_second_pass_alone(network, trainer):
    images, labels = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    plain = copy.deepcopy(network).train()
    plain(images)
    module = ready(FTSAM(network, rho=5.0), trainer).train()
    module.training_step((images, labels), 1)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(network.named_buffers())[name], value)
    with pytest.raises(ValueError, match="Expected `rho` to be in"):
        FTSAM(network, rho=-1.0)


def test_ft_sam_s_step_starts_from_the_weights_before_the_move(network, trainer):
    """One step of plain SGD: the old weights less the rate times the gradient at the moved ones."""
    images, labels = batch()
    by_hand, rate = copy.deepcopy(network).train(), 0.3
    weights = list(by_hand.parameters())
    before = [weight.detach().clone() for weight in weights]
    module = FTSAM(network, rho=0.7, label_smoothing=0.2, lr=rate, momentum=0.0, weight_decay=0.0)
    trainer().fit(module, DataLoader(TensorDataset(images, labels), len(images)))
    gradients = torch.autograd.grad(cross_entropy(by_hand(images), labels, 0.2), weights)
    length = sum(((w * g) ** 2).sum() for w, g in zip(weights, gradients, strict=True)) ** 0.5
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(0.7 * weight * weight * gradient / length)
    moved = torch.autograd.grad(cross_entropy(by_hand(images), labels, 0.2), weights)
    for mine, was, gradient in zip(network.parameters(), before, moved, strict=True):
        torch.testing.assert_close(mine, was - rate * gradient, atol=1e-5, rtol=1e-4)


def test_ft_sam_s_weights_come_back_to_the_bit(network, trainer):
    before = copy.deepcopy(list(network.parameters()))
    module = ready(FTSAM(network, rho=2.0), trainer).train()
    module.training_step(batch(), 1).backward()
    assert not any(torch.equal(now, was) for now, was in zip(network.parameters(), before, strict=True) if was.any())
    module.on_after_backward()
    assert all(torch.equal(now, was) for now, was in zip(network.parameters(), before, strict=True))


def test_ft_sam_s_two_passes_see_the_same_images_in_train_mode(network, trainer):
    module = ready(FTSAM(Spy(network)), trainer).train()
    images, labels = batch()
    module.training_step((images, labels), 1)
    assert module.model.modes == [{True}, {True}]
    assert all(torch.equal(seen, images) for seen in module.model.images)
