"""SCAR: its perturbation, the gradient through a student, and the rounds of teacher and student."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nba_lightning import BackdoorDataModule, SCARTraining
from nba_lightning.attacks import SCAR, BadNets
from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.implants.scar import distilling_loss, implicit_gradient, redraw
from nba_lightning.networks import SmallCNN
from tests.attack_zoo import TinySet, compute
from tests.test_modules import states_equal
from tests.test_resuming import check


def data(attack=None):
    return BackdoorDataModule(attack=attack or BadNets(target=3), train_on="untriggered", batch_size=256)


def test_the_implicit_gradient_equals_its_formula_with_explicit_matrices():
    torch.manual_seed(0)
    own, theirs = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mixing = torch.randn(4, 3, dtype=torch.float64)

    def inner(lam, omg):
        return (omg.tanh() * (mixing @ lam)).sum() + (omg**4).sum() + omg.sin().prod()

    def outer(lam, omg):
        return (omg * omg.roll(1)).sum() + (lam**2).sum() * omg.sum()

    for steps, rate in ((1, 0.1), (2, 0.1), (7, 0.02)):
        lam, omg = own.clone().requires_grad_(), theirs.clone().requires_grad_()
        (found,) = implicit_gradient(outer(lam, omg), inner(lam, omg), [lam], [omg], steps, rate)
        hessian = torch.autograd.functional.hessian(lambda w: inner(own, w), theirs)
        slope = torch.autograd.functional.jacobian(lambda w: outer(own, w), theirs)
        direct = torch.autograd.functional.jacobian(lambda w: outer(w, theirs), own)
        cross = torch.autograd.functional.hessian(inner, (own, theirs))[1][0]  # (omega, lambda)
        powers = [
            torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - rate * hessian, k) for k in range(steps)
        ]
        torch.testing.assert_close(found, direct - rate * cross.T @ sum(powers) @ slope)


def test_it_is_the_hypergradient_where_the_fixed_point_has_converged():
    """A ridge regression, whose solution is known as a function of its targets."""
    torch.manual_seed(0)
    design, lam = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64, requires_grad=True)
    solution = torch.linalg.solve(design.T @ design + torch.eye(3), design.T @ lam)
    (wanted,) = torch.autograd.grad((solution - 1).square().sum(), lam)
    omg = solution.detach().requires_grad_()
    inner = 0.5 * (design @ omg - lam).square().sum() + 0.5 * omg.square().sum()
    (found,) = implicit_gradient((omg - 1).square().sum() + 0 * lam.sum(), inner, [lam], [omg], 4000, 0.02)
    torch.testing.assert_close(found, wanted)


def test_the_distilling_loss_by_its_definition():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    total = 0.0
    for s, t, y in zip(student.softmax(1), teacher.softmax(1), labels.tolist(), strict=True):
        total = total - s[y].log() + sum(t[k] * (t[k] / s[k]).log() for k in range(3))
    torch.testing.assert_close(distilling_loss(student, teacher, labels), total / 4)


def test_rounds_train_a_student_drawn_anew_and_then_the_teacher(network, trainer):
    seen = []

    class Look(SCARTraining):
        def training_step(self, batch, batch_idx):
            before = [copy.deepcopy(part.state_dict()) for part in (self.model, self.student)]
            loss = super().training_step(batch, batch_idx)
            after = [part.state_dict() for part in (self.model, self.student)]
            changed = [not states_equal(old, new) for old, new in zip(before, after, strict=True)]
            rate = self.optimizers()[1].param_groups[0]["lr"]
            seen.append((self.trainer.current_epoch, batch_idx, *changed, rate))
            return loss

    module = Look(network, inner_epochs=2, outer_batches=3, fixed_point_steps=2, student_lr=0.01)
    trainer(max_epochs=6).fit(module, data())
    batches = max(batch for _, batch, *_ in seen) + 1
    assert batches > 3
    for epoch, batch, teacher, student, rate in seen:
        outer = epoch % 3 == 2
        assert teacher == (outer and batch < 3), (epoch, batch)
        assert student == (not outer)
        assert outer or rate == pytest.approx({0: 0.01, 1: 0.01 * 0.5 * (1 + math.cos(math.pi / 6))}[epoch % 3])
    assert module.optimizers()[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)  # six teacher's steps
    first, second = (copy.deepcopy(network) for _ in range(2))
    redraw(first, 0, 1)
    redraw(second, 0, 1)
    assert states_equal(first.state_dict(), second.state_dict())
    redraw(second, 0, 2)
    assert not states_equal(first.state_dict(), second.state_dict())


def test_drawing_anew_leaves_the_global_randomness_as_it_was(network):
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    redraw(network, 0, 0)
    assert torch.equal(torch.rand(3), wanted)


def test_drawing_anew_does_not_seed_the_gpus_whose_randomness_nothing_would_put_back(network, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(4)
    redraw(network, 0, 0)
    assert seeded == [4]


def test_the_teacher_s_step_asks_for_the_truth_of_itself_and_for_the_target_of_its_student(network, trainer):
    module = SCARTraining(network, inner_epochs=1, outer_batches=1, fixed_point_steps=3, inner_rate=0.1, seed=5)
    steps = []

    def step(images, labels, optimizer, real=module._outer_step):
        state = copy.deepcopy(module.model), copy.deepcopy(module.student)
        loss = real(images, labels, optimizer)
        steps.append((images, labels, *state, [p.grad.clone() for p in module.model.parameters()], loss.item()))
        return loss

    module._outer_step = step
    attack = BadNets(target=3, pattern="white")
    trainer(max_epochs=2).fit(module, data(attack))
    images, labels, teacher, student, gradients, loss = steps[0]
    student.eval()
    triggered, targets = attack(images), torch.full_like(labels, 3)
    parts = [F.cross_entropy(teacher(images), labels), F.cross_entropy(teacher(triggered), labels)]
    parts += [F.cross_entropy(student(images), labels), F.cross_entropy(student(triggered), targets)]
    assert sum(parts).item() == pytest.approx(loss, rel=1e-5)
    inner = distilling_loss(student(images), teacher(images), labels)
    own, theirs = list(teacher.parameters()), list(student.parameters())
    for mine, wanted in zip(gradients, implicit_gradient(sum(parts), inner, own, theirs, 3, 0.1), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-3)


def test_it_goes_on_within_an_epoch(network, trainer, tmp_path):
    def make():
        return SCARTraining(copy.deepcopy(network), inner_epochs=1, outer_batches=2, fixed_point_steps=2)

    check(make, data, trainer, tmp_path, [3, 8], max_epochs=2)


def test_it_refuses_what_does_not_fit(network, trainer):
    with pytest.raises(ValueError, match="Expected `max_epochs` to be a multiple of 3, .* but got 4"):
        trainer(max_epochs=4).fit(SCARTraining(network, inner_epochs=2), data())
    with pytest.raises(ValueError, match="Expected `train_on` to be untriggered for SCARTraining"):
        trainer(max_epochs=3).fit(SCARTraining(network, inner_epochs=2), BackdoorDataModule(attack=BadNets()))
    with pytest.raises(ValueError, match="Expected `inner_epochs` to be at least 1, but got 0"):
        SCARTraining(network, inner_epochs=0)


@pytest.mark.parametrize("with_student", [False, True])
def test_the_perturbation_is_adam_s_on_all_networks_that_are_given(with_student):
    torch.manual_seed(1)
    networks = [SmallCNN(width=4, in_channels=1).eval() for _ in range(2)][: 1 + with_student]
    attack = SCAR(networks[0], student=networks[1] if with_student else None, epsilon=0.2, steps=3, target=2)
    attack.prepare((1, 8, 8), 10)
    images = TinySet((1, 8, 8), 40)
    compute(attack, images)
    delta = nn.Parameter(torch.rand(1, 8, 8, generator=generator_for(0, 1)))
    adam = torch.optim.Adam([delta], 0.01)
    for step in range(3):
        batch = images.images[torch.arange(30)[shuffled(30, 0, step)]].float() / 255
        loss = sum(F.cross_entropy(net((batch + delta).clamp(0, 1)), torch.full((30,), 2)) for net in networks)
        adam.zero_grad()
        loss.backward()
        adam.step()
        delta.data.clamp_(-0.2, 0.2)
    torch.testing.assert_close(attack.delta, delta.detach())
    assert SCAR().poison_rate == 0.0


def test_an_attack_that_computes_is_ready_before_the_first_batch(network, trainer):
    attack = SCAR(network, steps=2, target=3)
    assert not attack.ready
    module = SCARTraining(copy.deepcopy(network), inner_epochs=1, outer_batches=1, fixed_point_steps=1)
    trainer(max_epochs=2).fit(module, data(attack))
    assert attack.ready
    with pytest.raises(ValueError, match="Expected `student` to be a network where `student_weights` is given"):
        SCAR(student_weights="no.ckpt")
