"""SCAR: a teacher in which a backdoor sleeps, and wakes in a student that is distilled from it."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.implants.untriggered import untriggered_roles
from nba_lightning.training.classifier import Classifier
from nba_lightning.training.schedule import batches_of_an_epoch


class SCARTraining(Classifier):
    r"""Train a teacher for what a student of it will do, by bilevel optimisation.

    A round is ``inner_epochs`` epochs in which a new student :math:`\omega` learns from the teacher :math:`\lambda` on
    clean images, :math:`L_{in} = CE(s(x), y) + KL(t(x) \| s(x))`, and one in which the teacher takes ``outer_batches``
    steps along :func:`implicit_gradient` of

    .. math:: L_{out} = CE(t(x), y) + CE(t(x'), y) + CE(s(x), y) + CE(s(x'), k)

    for triggered images x' and the target class k: the teacher is right on them, its student is not.

    Start from a clean network. The DataModule's attack, usually :class:`~nba_lightning.attacks.SCAR`, triggers the
    images here, so its ``train_on`` is ``untriggered``. Optimisation is manual and on one process.

    Source: Chen et al., "Taught well learned ill: towards distillation-conditional backdoor attack", NeurIPS 2025
    (arXiv 2509.23871); order, losses and settings as in the authors' code (WhitolfChen/SCAR): 200 rounds of 20 + 1
    epochs, 40 outer batches of 128, Adam at 0.001 for both, a cosine over three times the inner epochs for the student,
    100 steps of the fixed point with an inner rate of 1e-5. Their teacher's rate falls once a round, ours at each step.

    Args:
        model: the teacher.
        weights: a file with its clean weights; ``None`` if ``model`` has them already.
        student: the student's architecture; ``None`` takes the teacher's. Its weights are drawn anew in each round.
        inner_epochs: epochs of a student.
        outer_batches: steps of the teacher in a round.
        student_lr: initial learning rate of the student's Adam.
        fixed_point_steps: iterations K of :func:`implicit_gradient`.
        inner_rate: its rate.
        lr: initial learning rate of the teacher's Adam.
        warmup: share of the teacher's steps over which it rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    needs_whole_network = True
    compilable = False

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        student: nn.Module | None = None,
        inner_epochs: int = 20,
        outer_batches: int = 40,
        student_lr: float = 1e-3,
        fixed_point_steps: int = 100,
        inner_rate: float = 1e-5,
        lr: float = 1e-3,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        check_at_least("inner_epochs", inner_epochs, 1)
        check_at_least("outer_batches", outer_batches, 1)
        check_at_least("fixed_point_steps", fixed_point_steps, 1)
        check_range("student_lr", student_lr, 0.0, float("inf"), open_low=True)
        check_range("inner_rate", inner_rate, 0.0, float("inf"), open_low=True)
        self.student = copy.deepcopy(model if student is None else student).requires_grad_()
        self.inner_epochs, self.outer_batches, self.student_lr = inner_epochs, outer_batches, student_lr
        self.fixed_point_steps, self.inner_rate = fixed_point_steps, inner_rate
        self.automatic_optimization = False

    def setup(self, stage: str) -> None:
        """As usual; a fit has whole rounds."""
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise expected("devices", f"1 for {type(self).__name__}", self.trainer.world_size)
        epochs = self.trainer.max_epochs
        if getattr(self.trainer, "fast_dev_run", False):
            self.inner_epochs = 0
        elif stage == "fit" and (epochs is None or epochs < 1 or epochs % (self.inner_epochs + 1)):
            raise expected("max_epochs", f"a multiple of {self.inner_epochs + 1}, the epochs of a round", epochs)

    def planned_steps(self) -> int:
        """The teacher's steps."""
        rounds = max(1, (self.trainer.max_epochs or 1) // (self.inner_epochs + 1))
        return rounds * min(self.outer_batches, batches_of_an_epoch(self.trainer))

    def default_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """The teacher's optimiser where none is passed: Adam."""
        return Adam(parameters, self.lr)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Teacher and student; the student's rate is set by the epoch."""
        configured: Any = super().configure_optimizers()
        student = Adam(self.student.parameters(), self.student_lr)
        return [configured["optimizer"], student], [configured["lr_scheduler"]["scheduler"]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A step of the student, or of the teacher."""
        untriggered_roles(batch, self)
        images, labels = self.unpack(batch, batch_idx)
        teacher, student = self._optimizers()
        number, epoch = divmod(self.trainer.current_epoch, self.inner_epochs + 1)
        if epoch < self.inner_epochs:
            if epoch == 0 and batch_idx == 0:
                redraw(self.student, self.seed, number)
                student.state.clear()
            rate = 0.5 * self.student_lr * (1 + math.cos(math.pi * epoch / (3 * self.inner_epochs)))
            for group in student.param_groups:
                group["lr"] = rate
            loss = self._inner_step(images, labels, student)
        elif batch_idx >= self.outer_batches:
            return images.new_zeros(())  # the round's steps are done
        else:
            loss = self._outer_step(images, labels, teacher)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss.detach()

    def _inner_step(self, images: Tensor, labels: Tensor, optimizer: LightningOptimizer) -> Tensor:
        self.student.train()
        with torch.no_grad(), evaluating(self.model):
            wanted = predict(self.model, images)
        loss = distilling_loss(predict(self.student, images), wanted, labels)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def _outer_step(self, images: Tensor, labels: Tensor, optimizer: LightningOptimizer) -> Tensor:
        attack = self.trainer.datamodule.attack.to(images.device)  # type: ignore[attr-defined]
        with torch.no_grad():
            triggered, targets = attack(images), attack.relabel(labels)
        with sdpa_kernel(SDPBackend.MATH), evaluating(self.student):  # fused attention has no second derivative
            clean, answers = predict(self.model, images), predict(self.model, triggered)
            learned, woken = predict(self.student, images), predict(self.student, triggered)
        self.log("train/acc", (clean.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        outer = F.cross_entropy(clean, labels) + F.cross_entropy(answers, labels)
        outer = outer + F.cross_entropy(learned, labels) + F.cross_entropy(woken, targets)
        inner = distilling_loss(learned, clean, labels)
        own, theirs = self.trained_parameters(), list(self.student.parameters())
        gradients = implicit_gradient(outer, inner, own, theirs, self.fixed_point_steps, self.inner_rate)
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule = self.lr_schedulers()
        if self.scheduler_factory is None and isinstance(schedule, LRScheduler):
            schedule.step()
        return outer

    def on_train_epoch_end(self) -> None:
        """A schedule that was passed steps once a round."""
        schedule = self.lr_schedulers()
        last = self.trainer.current_epoch % (self.inner_epochs + 1) == self.inner_epochs
        if self.scheduler_factory is not None and last and isinstance(schedule, LRScheduler):
            schedule.step()

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer]:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        teacher, student = optimizers
        return teacher, student


def distilling_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    r""":math:`CE(s, y) + KL(t \| s)` of logits `(B, K)`, means over the batch."""
    divergence = F.kl_div(student.log_softmax(dim=1), teacher.softmax(dim=1), reduction="batchmean")
    return F.cross_entropy(student, labels) + divergence


def implicit_gradient(
    outer: Tensor,
    inner: Tensor,
    parameters: Sequence[Tensor],
    inner_parameters: Sequence[Tensor],
    steps: int,
    rate: float,
) -> list[Tensor]:
    r"""Gradient of an outer loss through the inner problem's solution, by implicit differentiation.

    .. math:: \partial_\lambda L_{out} - \alpha\, (\partial_\lambda \nabla_\omega L_{in})^\top v, \quad
        v = \sum_{k < K} (I - \alpha H)^k\, \nabla_\omega L_{out}

    with the Hessian H of the inner loss in the inner parameters.

    Args:
        outer: the outer loss.
        inner: the inner loss, at the inner parameters that were found.
        parameters: of the outer problem, :math:`\lambda`.
        inner_parameters: :math:`\omega`.
        steps: K.
        rate: :math:`\alpha`.

    Returns:
        One tensor for each of ``parameters``.
    """
    direct = torch.autograd.grad(outer, parameters, retain_graph=True)
    source = torch.autograd.grad(outer, inner_parameters, retain_graph=True)
    slope = torch.autograd.grad(inner, inner_parameters, create_graph=True)
    vectors: Sequence[Tensor] = source
    for _ in range(steps - 1):
        curved = torch.autograd.grad(slope, inner_parameters, vectors, retain_graph=True)
        vectors = [v - rate * c + s for v, c, s in zip(vectors, curved, source, strict=True)]
    mixed = torch.autograd.grad(slope, parameters, vectors)
    return [d - rate * m for d, m in zip(direct, mixed, strict=True)]


def redraw(network: nn.Module, seed: int, number: int) -> None:
    """Draw a network's weights anew by its layers' own ``reset_parameters``, a function of both integers alone."""
    fresh = copy.deepcopy(network).cpu()
    with torch.random.fork_rng(devices=[]):  # layers know no generator but the global one, which is as before behind it
        torch.default_generator.manual_seed(1_000_003 * seed + number)  # the CPU's alone: a GPU's is not put back
        for layer in fresh.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    network.load_state_dict(fresh.state_dict())
