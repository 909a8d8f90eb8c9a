"""What distilling defences share: a teacher that is given, or fine-tuned in the first epochs of the same fit."""

import copy
import math
import warnings
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.io.weights import load_weights
from nba_lightning.training.defense import Defense
from nba_lightning.training.schedule import batches_of_an_epoch


class Distillation(Defense):
    """Base class of defences with a student and a frozen teacher.

    The first ``teacher_epochs`` epochs of a fit fine-tune the suspicious network into the teacher; then the student
    starts from the suspicious weights. A module that has its teacher keeps it in further fits. A fit that ends before
    the student has begun leaves no cleaned weights. A subclass writes :meth:`student_step`.

    Args:
        model: the suspicious network, the student.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        teacher: a teacher that is given; ``None`` fine-tunes one.
        teacher_weights: a file with the weights of a given teacher of the student's architecture.
        teacher_epochs: epochs that fine-tune the teacher, out of the Trainer's ``max_epochs``.
        needs_teacher: whether any term asks the teacher; without, no epoch is spent on it.
        lr: initial learning rate of the student.
        teacher_lr: initial learning rate of the teacher; not used where ``optimizer`` is given, which then is the
            teacher's too.
        warmup: share of each phase over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    teacher_ready: Tensor

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        teacher: nn.Module | None = None,
        teacher_weights: str | None = None,
        teacher_epochs: int = 10,
        needs_teacher: bool = True,
        lr: float = 0.1,
        teacher_lr: float = 0.1,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        self.hparams.pop("needs_teacher", None)  # a subclass decides it, no user
        check_range("teacher_lr", teacher_lr, 0.0, float("inf"), open_low=True)
        check_at_least("teacher_epochs", teacher_epochs, 0)
        given = teacher is not None or teacher_weights is not None
        if not given and teacher_epochs == 0 and needs_teacher:
            raise expected("teacher_epochs", "at least 1 where no teacher is given", teacher_epochs)
        # While the teacher is being fine-tuned, `self.model` is what trains and `self.teacher` keeps the suspicious
        # weights; then the two change places. So one set of parameters trains in both phases.
        self.teacher = copy.deepcopy(model) if teacher is None else teacher
        if teacher_weights is not None:
            load_weights(self.teacher, teacher_weights)
        self.teacher.requires_grad_(False).eval()
        self.teacher_lr = teacher_lr
        self.teacher_epochs = 0 if given or not needs_teacher else teacher_epochs  # of this fit
        self._asked_epochs = self.teacher_epochs
        self.register_buffer("teacher_ready", torch.tensor(self.teacher_epochs == 0))

    def train(self, mode: bool = True) -> "Distillation":
        """As usual, but the teacher stays in ``eval`` mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        """As usual; decide which epochs of this fit are the teacher's."""
        super().setup(stage)
        if stage != "fit":
            return
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # the teacher must be
        self._was_ready = bool(self.teacher_ready)
        rushed = getattr(self.trainer, "fast_dev_run", False)  # one epoch; it is for the student
        self.teacher_epochs = 0 if rushed or self._was_ready else self._asked_epochs

    def teardown(self, stage: str) -> None:
        """As usual; a ``fast_dev_run`` has made no teacher."""
        super().teardown(stage)
        if stage == "fit" and getattr(self.trainer, "fast_dev_run", False):
            self.teacher_ready.fill_(self._was_ready)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how many of this fit's epochs are the teacher's."""
        checkpoint["teacher_epochs"] = self.teacher_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved fit."""
        self.teacher_epochs = checkpoint.get("teacher_epochs", self._asked_epochs)

    @property
    def cleaned(self) -> bool:
        """Whether ``model`` is the student, and not still the teacher in the making."""
        return bool(self.teacher_ready)

    def steps_of_an_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return max(1, math.ceil(batches_of_an_epoch(self.trainer) / self.trainer.accumulate_grad_batches))

    @property
    def student_epochs(self) -> float:
        """The student's share of the fit's epochs, infinite where the Trainer has no end."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        ends = [float(epochs)] if epochs is not None and epochs >= 0 else []
        ends += [steps / self.steps_of_an_epoch()] if steps >= 0 else []
        return min(ends, default=math.inf) - self.teacher_epochs

    def on_fit_start(self) -> None:
        """Check that there is time for both phases."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        if not self.teacher_epochs or self.student_epochs > 0:
            return
        if epochs is not None and 0 <= epochs <= self.teacher_epochs:
            raise expected("max_epochs", f"above the {self.teacher_epochs} `teacher_epochs`", epochs)
        needed = self.teacher_epochs * self.steps_of_an_epoch()
        raise expected("max_steps", f"above the {needed} steps of the `teacher_epochs`", steps)

    def phases(self) -> list[tuple[int, float]]:
        """The learning rate falls to 0 once for the teacher and once for the student."""
        ((total, _),) = super().phases()
        if not self.teacher_epochs:
            return [(total, 1.0)]
        height = self.teacher_lr / self.lr if self.optimizer_factory is None else 1.0
        return [(self.teacher_epochs * self.steps_of_an_epoch(), height), (total, 1.0)]

    def begin_epoch(self) -> None:
        """Begin what this epoch is for."""
        self.enter_phase()

    def enter_phase(self) -> bool:
        """Let student and teacher change places once the teacher is done; whether this epoch trains the student."""
        if self.trainer.current_epoch < self.teacher_epochs:
            return False
        if not self.teacher_ready:
            exchange_weights(self.model, self.teacher)
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            optimizer.state.clear()
            self.teacher_ready.fill_(True)
            rank_zero_info(f"The teacher is fine-tuned ({self.teacher_epochs} epochs); now the student is trained.")
        return True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The teacher's cross-entropy, or the student's loss."""
        if self.trainer.current_epoch < self.teacher_epochs:
            return super().training_step(batch, batch_idx)
        images, labels = self.unpack(batch)
        self.check_first_batch(images, batch_idx)
        loss = self.student_step(images, labels, batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def student_step(self, images: Tensor, labels: Tensor, batch_idx: int) -> Tensor:
        """The student's loss on clean images `(B, C, H, W)` in [0, 1] and labels `(B,)`."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")


@torch.no_grad()
def exchange_weights(first: nn.Module, second: nn.Module) -> None:
    """Let two networks of one architecture change weights and buffers, in place."""
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    first.load_state_dict(second.state_dict())
    second.load_state_dict(kept)
