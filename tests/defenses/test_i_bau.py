"""I-BAU against independent formulations."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call

from nba_lightning import IBAU
from nba_lightning.core.randomness import generator_for
from nba_lightning.defenses.i_bau import hypergradient
from nba_lightning.networks.normalize import Normalize
from tests.helpers import batch, cross_entropy, lively, ready


def test_the_hypergradient_of_a_quadratic_game_in_closed_form():
    torch.manual_seed(0)
    root, cross = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    curvature = root @ root.T + torch.eye(3, dtype=torch.float64)
    theta = torch.randn(2, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    inverse = torch.linalg.inv(curvature)
    best = inverse @ cross @ theta.detach()  # minimises d'Ad/2 - d'B theta
    rate = 1.0 / float(torch.linalg.eigvalsh(curvature).max())

    def outer(d):
        return (d**2).sum() + (theta**3).sum()

    value, (gradient, none) = hypergradient(
        outer, lambda d: d - rate * (curvature @ d - cross @ theta), best, [theta, unused], iterations=500
    )
    wanted = 3 * theta**2 + cross.T @ inverse @ (2 * best)
    torch.testing.assert_close(gradient, wanted.detach())
    assert none.item() == 0
    assert value.item() == pytest.approx(float(outer(best)))
    one = hypergradient(outer, lambda d: d - rate * (curvature @ d - cross @ theta), best, [theta], iterations=1)[1][0]
    torch.testing.assert_close(one, (3 * theta**2 + rate * cross.T @ (2 * best)).detach())


def test_i_bau_finds_a_perturbation_that_hurts_and_keeps_the_statistics(network, trainer, clean_digits):
    before = {name: value.clone() for name, value in network.named_buffers()}
    module = IBAU(network, penalty=0.0, portion=0.5)
    trainer(max_epochs=2).fit(module, clean_digits)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert module.perturbation.shape == (1, 1, 8, 8)
    images = torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        answers = network(images).argmax(dim=1)
        hurt = nn.functional.cross_entropy(network(images + module.perturbation), answers)
        plain = nn.functional.cross_entropy(network(images), answers)
    assert hurt > plain
    with pytest.raises(ValueError, match=r"Expected `portion` to be in \(0, 1\], but got 0"):
        IBAU(network, portion=0)


def test_i_bau_ascends_the_loss_of_its_own_answers_and_pays_for_the_norm(network, trainer):
    """d + 10 (the slope of CE(f(x + d), f(x))) - 10 * 2 * 0.3 d."""
    module = ready(IBAU(lively(network), inner_lr=10.0, penalty=0.3), trainer).eval()
    images = torch.rand(8, 1, 8, 8)
    shift = (0.1 * torch.randn(1, 1, 8, 8)).requires_grad_()
    answers = network(images).argmax(dim=1)
    slope = torch.autograd.grad(cross_entropy(network(images + shift), answers), shift)[0]
    wanted = shift + 10.0 * slope - 10.0 * 2 * 0.3 * shift
    torch.testing.assert_close(module._ascend(shift.detach(), images), wanted.detach(), atol=1e-5, rtol=1e-3)


def test_i_bau_finds_its_perturbation_from_zero_on_each_clean_batch_once(network, trainer, clean_digits):
    starts, seen = [], []

    class Look(IBAU):
        def _ascend(self, perturbation, images):
            starts.append(float(perturbation.abs().max()))
            seen.append(images.clone())
            assert not self.model.training
            return super()._ascend(perturbation, images)

    trainer(max_epochs=2).fit(Look(network), clean_digits)
    steps = len(clean_digits.train_dataloader())
    assert [start == 0.0 for start in starts] == ([True] + [False] * (steps - 1)) * 2
    for first in range(steps):
        assert not any(torch.equal(seen[first], seen[other]) for other in range(first + 1, steps))


def test_i_bau_s_gradient_is_the_hypergradient_by_explicit_jacobians(trainer):
    """With all first and second derivatives as matrices, of a network that is small enough for them."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    settings = {"iterations": 3, "inner_step": 0.4, "penalty": 0.2, "portion": 0.5}
    module = ready(IBAU(network, **settings), trainer).eval()
    held, truths = torch.rand(5, 1, 2, 2), torch.randint(0, 3, (5,))
    images, labels = torch.rand(6, 1, 2, 2), torch.randint(0, 3, (6,))
    module.perturbation = 0.3 * torch.randn(1, 1, 2, 2)
    module.inner_images, module.inner_labels = held, truths
    module.training_step((images, labels), 1).backward()
    chosen = torch.rand(6, generator=generator_for(0, 7, 0, 0, 1)).argsort().argsort() < 3  # as the step draws
    assert int(chosen.sum()) == 3
    names, weights = zip(*network.named_parameters(), strict=True)

    def entropy(x, y, parameters):
        return cross_entropy(functional_call(network, dict(zip(names, parameters, strict=True)), (x,)), y)

    def inner(d, *parameters):
        return 0.2 * (d**2).sum() - entropy(held + d, truths, parameters)

    def mapped(d, *parameters):
        return d - 0.4 * torch.autograd.grad(inner(d, *parameters), d, create_graph=True)[0]

    def outer(d, *parameters):
        return entropy(images + d * chosen.view(-1, 1, 1, 1), labels, parameters)

    point = (module.perturbation.requires_grad_(), *weights)
    by_d, *by_weights = torch.autograd.functional.jacobian(mapped, point)
    slope, *direct = torch.autograd.functional.jacobian(outer, point)
    matrix, slope = by_d.reshape(4, 4), slope.reshape(4)
    vector = slope + matrix.T @ slope + matrix.T @ matrix.T @ slope  # three terms of Neumann's series
    for weight, first, by_weight in zip(weights, direct, by_weights, strict=True):
        wanted = first + (vector @ by_weight.reshape(4, -1)).view_as(first)
        torch.testing.assert_close(weight.grad, wanted, atol=1e-5, rtol=1e-3)


def test_i_bau_on_normalised_images_is_another_choice_of_steps_and_penalty(network, trainer):
    """What the docstring says of a benchmark whose perturbation is added to normalised images."""
    deviation, double = 0.25, lively(network).double().eval()
    images, labels = torch.rand(100, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (100,))
    share = deviation**2
    inside = nn.Sequential(Normalize(0.5, deviation, channels=1).double(), copy.deepcopy(double)).eval()
    mine = ready(IBAU(inside, inner_lr=10 * share, inner_step=0.1 * share, penalty=0.001 / share), trainer)
    theirs = ready(IBAU(double), trainer)
    for module, seen in ((mine, images), (theirs, (images - 0.5) / deviation)):
        module.perturbation = module._ascend(torch.zeros_like(seen[:1]), seen)
        module.training_step((seen, labels), 1).backward()
    assert float(theirs.perturbation.abs().max()) > 0.01
    torch.testing.assert_close(mine.perturbation, deviation * theirs.perturbation)
    for one, other in zip(mine.trained_parameters(), theirs.trained_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_i_bau_keeps_the_first_batch_of_a_round_for_the_map(network, trainer):
    module = ready(IBAU(network), trainer).eval()
    module.perturbation = torch.zeros(1, 1, 8, 8)
    first, second = batch(), batch()
    module.training_step(first, 1)
    module.training_step(second, 2)
    assert torch.equal(module.inner_images, first[0])
    assert torch.equal(module.inner_labels, first[1])


def in_step(first, second):
    """What two functions of ``reduce`` give that run as two processes would: each call is the mean of both."""
    barrier, given, found = threading.Barrier(2, timeout=60), [None, None], [None, None]

    def run(rank, function):
        def reduce(tensor):
            given[rank] = tensor.detach()
            barrier.wait()
            mean = (given[0] + given[1]) / 2
            barrier.wait()
            return mean

        found[rank] = function(reduce)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_hypergradient_of_two_processes_is_that_of_their_mean_game():
    torch.manual_seed(0)
    halves = [(torch.randn(3, 3).double(), torch.randn(3, 2).double(), torch.randn(3).double()) for _ in range(2)]
    theta, start = torch.randn(2, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)

    def game(curvature, cross, goal):
        return (
            lambda d: ((d - goal) ** 2).sum() * (theta**2).sum(),
            lambda d: d - 0.1 * (curvature @ d - cross @ theta) * (1 + theta[0] * d),
        )

    def mean(index):
        return lambda d: sum(game(*half)[index](d) for half in halves) / 2

    (whole,) = hypergradient(mean(0), mean(1), start, [theta], iterations=4)[1]
    pair = in_step(
        *(
            lambda reduce, half=half: hypergradient(*game(*half), start, [theta], iterations=4, reduce=reduce)[1][0]
            for half in halves
        )
    )
    torch.testing.assert_close(sum(pair) / 2, whole)  # as DDP averages them


def test_i_bau_ascends_along_the_slope_of_all_processes(network, trainer):
    module, start = ready(IBAU(network, penalty=0.0), trainer), torch.rand(1, 1, 8, 8)
    module.reduce = torch.zeros_like
    assert torch.equal(module._ascend(start, torch.rand(4, 1, 8, 8)), start)


class Attending(nn.Module):
    """A network with the attention of vision transformers."""

    def __init__(self):
        super().__init__()
        self.inner, self.fc = nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, images):
        query, key, value = self.inner(images[:, 0]).chunk(3, dim=-1)
        return self.fc(nn.functional.scaled_dot_product_attention(query, key, value).mean(dim=1))


def test_i_bau_differentiates_attention_twice(trainer):
    """Its fast forms have no second derivative."""
    module = ready(IBAU(Attending(), iterations=2), trainer).eval()
    module.perturbation = torch.zeros(1, 1, 8, 8)
    module.training_step(batch(), 1).backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in module.model.parameters())
