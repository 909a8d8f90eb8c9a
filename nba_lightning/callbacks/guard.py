"""A guard over clean accuracy: a network that lost too much of it is not handed over as cleaned."""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics.utilities.distributed import gather_all_tensors

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import predict
from nba_lightning.core.metrics import IGNORE_LABEL
from nba_lightning.core.modes import Frozen, evaluating, placed
from nba_lightning.core.paired import FEW_PAIRS, Paired
from nba_lightning.io.batches import as_batch, held_out_loader, on_device

Verdict = Literal["accepted", "rejected", "unknown"]


class RejectedError(RuntimeError):
    """The teacher lost too much clean accuracy to teach."""


@dataclass(frozen=True)
class Accuracy:
    """Clean accuracy on held-out images.

    Attributes:
        value: share of the images that are predicted as their class, in [0, 1].
        standard_error: sqrt(p (1 - p) / n).
        images: n.
    """

    value: float
    standard_error: float
    images: int


@dataclass(frozen=True)
class Answers:
    """What a network says to the held-out images, in their order.

    Attributes:
        labels: `(n,)` true classes.
        predicted: `(n,)` the network's.
    """

    labels: Tensor
    predicted: Tensor

    @property
    def right(self) -> Tensor:
        """`(n,)` bool."""
        return self.labels == self.predicted

    def accuracy(self) -> Accuracy:
        """Share of right answers; of at least one image."""
        share, n = float(self.right.double().mean()), len(self.labels)
        return Accuracy(share, math.sqrt(share * (1 - share) / n), n)


class Guard(Callback):
    r"""Compare clean accuracy with the suspicious network's on held-out images; reject what lost too much.

    The teacher (if the module has one) is judged before the first step, and a rejected one ends the fit by
    :class:`RejectedError`. The student is judged when the fit has ended; a rejected one is written as
    ``rejected.safetensors`` by :class:`~nba_lightning.callbacks.CleanedWeights`, never as cleaned. Rejected is what
    lost more than ``max_loss`` (the teacher: ``teacher_max_loss``) *and* more than twice the standard error of the
    paired difference

    .. math:: \hat d = \frac{b - c}{n}, \qquad SE = \frac{1}{n} \sqrt{b + c - \frac{(b - c)^2}{n}}

    where b of the n images were right before only and c are right after only (McNemar, Psychometrika 1947), *and*
    is beyond chance by the exact test too: five lost ones and none gained are not, of however many. Of fewer than
    ``min_images`` images the verdict on what is not rejected is ``"unknown"``, with an interval.

    Held-out images are those of :func:`~nba_lightning.io.batches.held_out_loader`. Logs ``guard/suspicious``,
    ``guard/teacher``, ``guard/student`` and their ``guard/..._standard_error``. Nothing is done in a ``fast_dev_run``.

    Args:
        max_loss: clean accuracy that may be lost, in [0, 1].
        every_n_epochs: judge the student every so many epochs too, and stop the fit where it is rejected; 0 judges it
            at the end only. A high learning rate costs accuracy that comes back as it falls.
        min_images: held-out images below which a small loss cannot be told from none.
        teacher_max_loss: what the teacher may have lost, in [0, 1]; ``None`` for ``max_loss``.
        advise: whether sentences name these arguments and say what to try; not where a chain sets and tries it itself.

    Attributes:
        verdict: on the student, after the fit; ``None`` before it.
        sentence: the verdict in words.
        accuracies: of ``suspicious``, ``teacher`` and ``student``.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        max_loss: float = 0.05,
        every_n_epochs: int = 0,
        min_images: int = FEW_PAIRS,
        teacher_max_loss: float | None = None,
        advise: bool = True,
    ) -> None:
        check_range("max_loss", max_loss, 0.0, 1.0)
        if teacher_max_loss is not None:
            check_range("teacher_max_loss", teacher_max_loss, 0.0, 1.0)
        check_at_least("every_n_epochs", every_n_epochs, 0)
        check_at_least("min_images", min_images, 1)
        self.max_loss, self.every_n_epochs, self.min_images = max_loss, every_n_epochs, min_images
        self.teacher_max_loss = max_loss if teacher_max_loss is None else teacher_max_loss
        self.advise = advise
        self._restored = self._concluded = False
        self._came: nn.Module | None = None
        self._reset()

    def _reset(self) -> None:
        self.verdict: Verdict | None = None
        self.sentence = ""
        self.accuracies: dict[str, Accuracy] = {}
        self._before: Answers | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the network as it comes: a defence may put the teacher's weights into it before the first step."""
        if stage == "fit" and not getattr(trainer, "fast_dev_run", False):
            self._came = copy.deepcopy(_network(pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the suspicious network and judge the teacher; a fit that goes on has done so."""
        restored, self._restored, self._concluded = self._restored, False, False
        if getattr(trainer, "fast_dev_run", False):
            return
        if restored:
            self.verdict, self.sentence, self._came = None, "", None
            return
        self._reset()
        came, self._came = self._came, None
        if came is None or getattr(trainer, "ckpt_path", None):
            return  # the fit goes on from a checkpoint without a guard's figures
        network = trainer.precision_plugin.convert_module(came).to(pl_module.device)
        self._before = self._ask(trainer, network, "suspicious")
        teacher = getattr(pl_module, "teacher", None)
        if isinstance(teacher, Frozen) and self._before is not None:
            verdict, sentence = self._judge("teacher", self._ask(trainer, teacher.network, "teacher"))
            if verdict == "rejected":
                raise RejectedError(sentence)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the student now and then, if that was asked for."""
        if not self.every_n_epochs or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if not getattr(trainer, "fast_dev_run", False):
            self._judge_student(trainer, pl_module)
            trainer.should_stop = trainer.should_stop or self.verdict == "rejected"

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the student."""
        self.conclude(trainer, pl_module)

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the student as the fit leaves it, and say it; once, whoever asks first."""
        if getattr(trainer, "fast_dev_run", False) or trainer.state.status == "interrupted" or self._concluded:
            return
        self._concluded = True
        self._judge_student(trainer, pl_module)
        if getattr(trainer, "loggers", None):
            for logger in trainer.loggers:
                logger.save()  # what came after its last flush
        (rank_zero_info if self.verdict == "accepted" else rank_zero_warn)(self.sentence)

    def state_dict(self) -> dict[str, Any]:
        """The suspicious network's answers, which a fit that goes on cannot ask for again, and the figures so far."""
        before = self._before
        return {
            "before": None if before is None else {"labels": before.labels, "predicted": before.predicted},
            "accuracies": {name: vars(found) for name, found in self.accuracies.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        before = state_dict["before"]
        self._before = None if before is None else Answers(before["labels"].cpu(), before["predicted"].cpu())
        self.accuracies = {name: Accuracy(**found) for name, found in state_dict["accuracies"].items()}
        self._restored = True

    def _judge_student(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = self._ask(trainer, _network(pl_module), "student")
        role = "student" if isinstance(getattr(pl_module, "teacher", None), Frozen) else "fitted network"
        self.verdict, self.sentence = self._judge(role, found)

    def _ask(self, trainer: pl.Trainer, network: nn.Module, role: str) -> Answers | None:
        """Ask a network, keep and log its accuracy; ``None`` without held-out images."""
        found = answers(trainer, network)
        if found is None:
            return None
        accuracy = self.accuracies[role] = found.accuracy()
        figures = {f"guard/{role}": accuracy.value, f"guard/{role}_standard_error": accuracy.standard_error}
        # Not by `self.log`, which is closed before the first step and after the last one.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        return found

    def _judge(self, role: str, after: Answers | None) -> tuple[Verdict, str]:
        """The verdict on a network, and why."""
        before, name = self._before, "teacher_max_loss" if role == "teacher" else "max_loss"
        allowed = self.teacher_max_loss if role == "teacher" else self.max_loss
        limit = f"`{name}` ({_points(allowed)})" if self.advise else f"the {_points(allowed)} that it may lose"
        if after is None:
            return "unknown", (
                f"No images were held out, so the guard cannot know what the {role} lost. Hold some out, or look at "
                "its accuracy on other images before you use it."
            )
        now = f"the {role} is right on {int(after.right.sum())} of {len(after.labels)} held-out images"
        if before is None or not torch.equal(before.labels, after.labels):
            return "unknown", (
                f"The guard knows that {now}, but not what the suspicious network says to them, since the fit goes on "
                "from a checkpoint without its answers or with other images; so it cannot know what was lost."
            )
        pair = Paired.of(before.right, after.right)
        was = f"{now}, the suspicious network on {int(before.right.sum())}"
        few = pair.images < self.min_images
        if pair.loss > allowed and pair.beyond_chance():
            return "rejected", (
                f"Rejected: {was}; that is a loss of {_points(pair.loss)} (standard error "
                f"{100 * pair.standard_error:.1f}), more than {limit}.{_ADVICE[role] if self.advise else ''}"
            )
        if few:
            low, high = pair.interval()
            return "unknown", (
                f"With so few images the guard cannot know what was lost: {was}; the loss may be anything from "
                f"{100 * low:.1f} to {_points(high)} (95 %; below 0 is a gain)."
            )
        error = f"(standard error {100 * pair.standard_error:.1f})"
        if pair.loss == 0:
            low, high = pair.interval()  # where no image changed sides the standard error is 0, which is no certainty
            return "accepted", f"Accepted: {was}; nothing was lost (95 %: {100 * low:.1f} to {_points(high)})."
        if pair.loss < 0:
            return "accepted", f"Accepted: {was}; that is a gain of {_points(-pair.loss)} {error}."
        within = f"within {limit}" if pair.loss <= allowed else f"more than {limit}, but may be chance"
        return "accepted", f"Accepted: {was}; the loss of {_points(pair.loss)} {error} is {within}."


_ADVICE = {
    "teacher": " Make the teacher with a smaller learning rate, fewer steps or more images, or take another one.",
    "student": " Try a smaller learning rate, more clean images, or another teacher.",
    "fitted network": " Try a smaller learning rate, fewer steps or more clean images.",
}


def answers(trainer: pl.Trainer, network: nn.Module) -> Answers | None:
    """Ask a network for the classes of all held-out images, of all processes; ``None`` where there are none.

    It is asked on the Trainer's device, and goes back to where it was: a fit that has ended left it on the CPU.
    """
    loader = held_out_loader(trainer)
    if loader is None:
        return None
    parts: list[tuple[Tensor, Tensor]] = []
    precision = trainer.precision_plugin.forward_context()
    with torch.no_grad(), evaluating(network), placed(network, trainer.strategy.root_device), precision:
        for given in loader:
            batch = as_batch(on_device(trainer, given), _network(trainer.lightning_module))
            if batch.labels is None:
                raise ValueError("Expected held-out images with labels, but got images alone.")
            parts.append((batch.labels, predict(network, batch.images).argmax(dim=1)))
    if not parts:
        return None
    labels, predicted = (torch.cat(part) for part in zip(*parts, strict=True))
    if trainer.world_size > 1 and isinstance(getattr(loader, "sampler", None), DistributedSampler):
        # Else each process went through all of them, and adding up would count each image several times.
        labels, predicted = (torch.cat(gather_all_tensors(part)) for part in (labels, predicted))
    real = labels != IGNORE_LABEL
    return Answers(labels[real].cpu(), predicted[real].cpu()) if bool(real.any()) else None


def _network(module: pl.LightningModule) -> nn.Module:
    assert isinstance(module.model, nn.Module)
    return module.model


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
