import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nba_lightning.callbacks import PseudoSampleRegeneration
from nba_lightning.core.modes import evaluating
from nba_lightning.core.randomness import generator_for
from nba_lightning.pseudo import (
    JSDisagreement,
    KLDisagreement,
    SamplePerturbations,
    UniversalPerturbations,
)
from nba_lightning.pseudo.base import project
from tests.reference import knowledge_forms as reference


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


def test_the_default_disagreement_is_the_teacher_s_divergence_from_the_student():
    """KL(T || S): large where the student gives no chance to what the teacher says, not the other way round."""
    student, teacher = torch.randn(6, 4), 3 * torch.randn(6, 4)
    for kind in (UniversalPerturbations(), SamplePerturbations()):
        found = kind.disagreement(student, teacher)
        np.testing.assert_allclose(found, reference.kl_divergence(teacher.numpy(), student.numpy()), rtol=1e-4)
    opposite = reference.kl_divergence(student.numpy(), teacher.numpy())
    assert not np.allclose(found, opposite, rtol=0.1)
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(KLDisagreement()(unsure, sure)) == pytest.approx(math.log(2), abs=1e-2)  # the teacher is sure
    assert float(KLDisagreement()(sure, unsure)) > 3.0


def crafted_by_hand(networks, images, perturbations, owner, rms, steps):
    """Steps along the normalised gradient of KL(T || S), one perturbation at a time, on one batch for each step."""
    student, teacher = networks
    for batch in images:
        leaf = perturbations.clone().requires_grad_()
        inputs = torch.stack([(one + leaf[k]).clip(0, 1) for one, k in zip(batch, owner, strict=True)])
        p, q = teacher(inputs).softmax(dim=1), student(inputs).softmax(dim=1)
        slope = torch.autograd.grad((p * (p / q).log()).sum(), leaf)[0]
        for k in range(len(perturbations)):
            length = 2.5 * rms * math.sqrt(batch[0].numel()) / steps
            moved = perturbations[k] + length * slope[k] / (slope[k] ** 2).sum().sqrt()
            size = float((moved**2).mean().sqrt())
            perturbations[k] = moved * min(1.0, rms / size)
    return perturbations


def test_a_bank_is_the_ascent_by_hand_on_another_batch_in_each_step(networks):
    given = [next(batches()) for _ in range(3)]
    kind = UniversalPerturbations(2, rms=0.1, steps=3)
    kind.regenerate(*networks, iter(given), generator_for(0))
    start = torch.randn(2, 3, 4, 4, generator=generator_for(0))
    start = start * torch.stack([0.01 / (one**2).mean().sqrt() for one in start]).view(2, 1, 1, 1)
    owner = [i % 2 for i in range(12)]
    torch.testing.assert_close(kind.bank, crafted_by_hand(networks, given, start, owner, 0.1, 3))


def test_the_bank_s_gradients_are_those_of_all_processes(networks):
    kind, seen = UniversalPerturbations(2, rms=0.1, steps=3), []
    kind.regenerate(
        *networks, batches(), generator_for(0), lambda tensor: seen.append(tensor) or torch.zeros_like(tensor)
    )
    assert len(seen) == 3
    torch.testing.assert_close(kind.bank.square().mean().sqrt(), torch.tensor(0.01))  # no step was made


def test_perturbations_of_samples_are_the_ascent_by_hand(networks):
    images = next(batches())
    start = torch.randn(images.shape, generator=generator_for(1))
    start = start * torch.stack([0.02 / (one**2).mean().sqrt() for one in start]).view(12, 1, 1, 1)
    wanted = crafted_by_hand(networks, [images] * 3, start, range(12), 0.2, 3)
    found = SamplePerturbations(rms=0.2, steps=3)(images, *networks, generator_for(1))
    torch.testing.assert_close(found, wanted)


class Noting(nn.Sequential):
    """A network that notes its mode and its inputs."""

    def forward(self, images):
        self.__dict__.setdefault("seen", []).append((self.training, images.detach().clone()))
        return super().forward(images)


@pytest.mark.parametrize("kind", [UniversalPerturbations(3, rms=0.9, steps=4), SamplePerturbations(rms=0.9, steps=4)])
def test_crafting_asks_both_networks_in_eval_mode_about_the_same_images_in_range(kind):
    student, teacher = (Noting(nn.Flatten(), nn.Linear(48, 5), nn.Dropout(0.5)).train() for _ in range(2))
    kind.regenerate(student, teacher, batches(), generator_for(0))
    kind(next(batches()), student, teacher, generator_for(1))
    assert student.training
    assert teacher.training
    assert len(student.seen) == len(teacher.seen) == 4
    for (mode, mine), (other, theirs) in zip(student.seen, teacher.seen, strict=True):
        assert not mode
        assert not other
        assert torch.equal(mine, theirs)
        assert 0.0 <= float(mine.min()) <= float(mine.max()) <= 1.0
    assert float(mine.max()) == 1.0  # so far out that the clamp has work to do
    assert all(parameter.grad is None for parameter in (*student.parameters(), *teacher.parameters()))


def test_a_bank_goes_through_a_sequence_of_batches_again_and_again(networks):
    given, seen = [next(batches()) for _ in range(2)], []
    kind = UniversalPerturbations(1, steps=5)
    gradients = kind._gradients
    kind._gradients = lambda student, teacher, images, *args: (
        seen.append(images) or gradients(student, teacher, images, *args)
    )
    kind.regenerate(*networks, given, generator_for(0))
    assert [next(i for i, one in enumerate(given) if one is images) for images in seen] == [0, 1, 0, 1, 0]


def test_every_perturbation_of_a_bank_is_drawn_for_single_images_by_the_generator():
    kind = UniversalPerturbations(3)
    kind.bank = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    found = kind(torch.zeros(300, 3, 4, 4), generator=generator_for(0))
    assert (found == found[:, :1, :1, :1]).all()
    counts = found[:, 0, 0, 0].long().bincount(minlength=3).tolist()
    assert all(70 <= count <= 130 for count in counts)  # 100 each, at most 4 deviations off
    assert torch.equal(found, kind(torch.zeros(300, 3, 4, 4), generator=generator_for(0)))
    assert not torch.equal(found, kind(torch.zeros(300, 3, 4, 4), generator=generator_for(1)))


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (0, [0])])
def test_pseudo_samples_are_regenerated_before_the_first_step_of_every_so_many_epochs(every, due):
    callback, calls = PseudoSampleRegeneration(every), []
    module = SimpleNamespace(regenerate=lambda: calls.append((epoch, index)))
    for epoch in range(5):
        if epoch == 3:  # the fit was resumed
            state = callback.state_dict()
            callback = PseudoSampleRegeneration(every)
            callback.load_state_dict(state)
        for index in range(3):
            callback.on_train_batch_start(None, module, None, index)
    assert calls == [(epoch, 0) for epoch in due]


@pytest.mark.parametrize(("every", "least", "due"), [(1, 2, [0, 2, 4]), (3, 2, [0, 3]), (0, 2, [0])])
def test_a_module_may_let_pseudo_samples_serve_more_epochs(every, least, due):
    callback, calls = PseudoSampleRegeneration(every), []
    module = SimpleNamespace(
        regenerate=lambda: calls.append(callback.epochs - 1), least_epochs_of_pseudo_samples=lambda: least
    )
    for _ in range(5):
        callback.on_train_batch_start(None, module, None, 0)
    assert calls == due


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
