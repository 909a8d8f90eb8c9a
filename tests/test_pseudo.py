import itertools

import pytest
import torch
from torch import nn

from nba_lightning.core.modes import evaluating
from nba_lightning.core.randomness import generator_for
from nba_lightning.pseudo import (
    JSDisagreement,
    KLDisagreement,
    SamplePerturbations,
    UniversalPerturbations,
)
from nba_lightning.pseudo.base import project


@pytest.fixture
def networks():
    torch.manual_seed(3)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)) for _ in range(2))
    return student, teacher


def batches():
    return itertools.repeat(torch.full((12, 3, 4, 4), 0.5) + 0.1 * torch.rand(12, 3, 4, 4))


def disagreement(networks, images, perturbations):
    student, teacher = networks
    inputs = (images + perturbations).clamp(0, 1)
    return float(KLDisagreement()(student(inputs), teacher(inputs)).mean().detach())


def test_projection_bounds_the_root_mean_square_and_leaves_small_ones():
    perturbations = torch.randn(3, 3, 4, 4) * torch.tensor([0.001, 1.0, 100.0]).view(3, 1, 1, 1)
    projected = project(perturbations, 0.1)
    size = projected.flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(size[1:], torch.tensor([0.1, 0.1]))
    torch.testing.assert_close(projected[0], perturbations[0])


@pytest.mark.parametrize("kind", [UniversalPerturbations(3, rms=0.1, steps=8), SamplePerturbations(rms=0.1, steps=8)])
def test_crafting_makes_student_and_teacher_disagree_within_the_bound(networks, kind):
    kind.regenerate(*networks, batches(), generator_for(0), lambda tensor: tensor)
    images = next(batches())
    perturbations = kind(images, *networks, generator_for(1))
    random = project(torch.randn(images.shape), 0.1)
    assert (perturbations.flatten(1).square().mean(1).sqrt() <= 0.1 + 1e-5).all()
    assert disagreement(networks, images, perturbations) > 1.5 * disagreement(networks, images, random)


def test_the_gradient_step_is_the_one_of_finite_differences(networks):
    kind = UniversalPerturbations(1, rms=0.1, disagreement=JSDisagreement())
    images, start = next(batches()).double(), torch.zeros(1, 3, 4, 4, dtype=torch.double)
    student, teacher = (network.double() for network in networks)
    gradient = kind._gradients(student, teacher, images, start, torch.zeros(12, dtype=torch.long))[0]
    step = torch.zeros_like(start)
    step[0, 1, 2, 3] = 1e-2
    values = [JSDisagreement()(student(images + s), teacher(images + s)).sum() for s in (step, -step)]
    assert float(gradient[1, 2, 3]) == pytest.approx(float((values[0] - values[1]).detach() / 2e-2), rel=2e-2)


def test_each_perturbation_of_the_bank_learns_from_its_own_samples_and_they_differ(networks):
    kind = UniversalPerturbations(2, rms=0.1, steps=1)
    kind.regenerate(*networks, batches(), generator_for(0), lambda tensor: tensor)
    assert kind.bank.shape == (2, 3, 4, 4)
    assert not torch.allclose(kind.bank[0], kind.bank[1])


def test_the_bank_goes_on_from_the_last_one_unless_restarted(networks):
    for restart in (False, True):
        kind = UniversalPerturbations(1, rms=0.1, steps=0, restart=restart)
        kind.bank = torch.full((1, 3, 4, 4), 0.05)
        kind.steps = 1
        kind.regenerate(*networks, batches(), generator_for(0), torch.zeros_like)
        assert torch.allclose(kind.bank, torch.tensor(0.05)) is not restart


def test_the_bank_travels_in_the_state_dict(networks):
    kind = UniversalPerturbations(2)
    kind.regenerate(*networks, batches(), generator_for(0), lambda tensor: tensor)
    other = UniversalPerturbations(2)
    other.load_state_dict(kind.state_dict())
    torch.testing.assert_close(other.bank, kind.bank)


def test_no_steps_leave_noise(networks):
    made = UniversalPerturbations(2, steps=0)
    made.regenerate(*networks, batches(), generator_for(0))
    assert 0 < made.bank.square().mean().sqrt() < made.rms
    assert made(next(batches()), *networks, generator_for(0)).shape == (12, 3, 4, 4)


def test_a_bank_that_was_never_crafted_is_named(networks):
    with pytest.raises(RuntimeError, match="regenerate"):
        UniversalPerturbations()(next(batches()), *networks, generator_for(0))
    with pytest.raises(ValueError, match=r"Expected `rms` to be in \(0, 1\], but got 4"):
        UniversalPerturbations(rms=4.0)
    with pytest.raises(ValueError, match="Expected `number` to be at least 1"):
        UniversalPerturbations(0)


def test_evaluating_gives_every_layer_its_own_mode_back():
    network = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    network.train()
    network[1].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, True, False]
