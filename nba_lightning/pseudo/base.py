"""Pseudo samples: clean images perturbed so that the student shows behaviour that the teacher does not share.

Crafted from clean images against the student and the frozen teacher alone; the true trigger is never seen.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import predict
from nba_lightning.core.functional import js_divergence, kl_divergence

Reduce = Callable[[Tensor], Tensor]


def same(tensor: Tensor) -> Tensor:
    """The mean over one process."""
    return tensor


def repeated(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches again and again."""
    while True:
        yield from batches


class Disagreement(nn.Module, ABC):
    """What crafting maximises: how much the student's answer differs from the teacher's."""

    @abstractmethod
    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Logits `(B, K)` of both to a value per sample `(B,)`."""


class KLDisagreement(Disagreement):
    """KL(teacher || student): unbounded, strongest where the student gives no chance to the teacher's answer."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """See :func:`nba_lightning.core.functional.kl_divergence`."""
        return kl_divergence(teacher_logits, student_logits)


class JSDisagreement(Disagreement):
    """Jensen-Shannon divergence: two-sided and at most ln 2, so that no sample dominates."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """See :func:`nba_lightning.core.functional.js_divergence`."""
        return js_divergence(student_logits, teacher_logits)


class PseudoSamples(nn.Module, ABC):
    """Base class of all ways to craft pseudo samples.

    Args:
        rms: bound on the root mean square of a perturbation over its values, in units of the image range [0, 1].
            0.018 is a Euclidean norm of 1 for 3x32x32 images.
        steps: gradient steps.
        disagreement: what is maximised; KL(teacher || student) by default.
    """

    def __init__(self, rms: float = 0.018, steps: int = 10, disagreement: Disagreement | None = None) -> None:
        super().__init__()
        check_range("rms", rms, 0.0, 1.0, open_low=True)
        check_at_least("steps", steps, 0)
        self.rms, self.steps = rms, steps
        self.disagreement = disagreement or KLDisagreement()

    def regenerate(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Iterable[Tensor],
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> None:
        """Renew what is kept from epoch to epoch; nothing by default.

        Args:
            student: the current student; it is in ``eval`` mode meanwhile.
            teacher: the frozen teacher, likewise.
            batches: clean images `(B, C, H, W)` in [0, 1]; a sequence of batches is gone through again and again.
            generator: source of randomness, the same on all processes, on the images' device; ``None`` is torch's own.
            reduce: averages a tensor over all processes; one process needs none.
        """

    def passes(self, batch: int, num_classes: int) -> int:
        """How often images go through a network, forwards or backwards, in one regeneration.

        Args:
            batch: images of a batch.
            num_classes: of the networks.
        """
        return 0

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Perturbations `(B, C, H, W)` for clean images `(B, C, H, W)` in [0, 1]; not yet clamped."""

    def put_on(
        self,
        images: Tensor,
        share: float,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A batch `(B, C, H, W)` in [0, 1] whose first ``share`` are pseudo samples; loaders shuffle."""
        number = round(share * len(images))
        if number == 0:
            return images
        perturbations = self(images[:number], student, teacher, generator)
        return torch.cat([(images[:number] + perturbations).clamp(0.0, 1.0), images[number:]]).to(images.dtype)

    def _ascend(self, perturbations: Tensor, gradients: Tensor, step_size: float) -> Tensor:
        """One step along the normalised gradient, then back into the ball."""
        norms = gradients.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        return project(perturbations + step_size * gradients / norms, self.rms)

    def _gradients(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, perturbations: Tensor, owner: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            leaf = perturbations.detach().requires_grad_()
            inputs = (images + leaf[owner]).clamp(0.0, 1.0).to(images.dtype)
            total = self.disagreement(predict(student, inputs), predict(teacher, inputs)).sum()
            return torch.autograd.grad(total, leaf)[0].float()


class Banked(PseudoSamples):
    """Base class of pseudo samples that are kept in a bank `(N, C, H, W)` from epoch to epoch.

    The bank travels in checkpoints and is the same on all processes. It is no buffer: its shape is known with the first
    images only, and callbacks that copy or average a module at the start of a fit rely on shapes that stay.
    """

    def __init__(self, rms: float, steps: int, disagreement: Disagreement | None = None) -> None:
        super().__init__(rms, steps, disagreement)
        self.bank = torch.empty(0)

    def drawn(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """A row of the bank for each image `(B,)`, at random; an error if there is no bank yet."""
        if self.bank.numel() == 0:
            raise too_early("sampling")
        return torch.randint(len(self.bank), (len(images),), generator=generator, device=images.device)

    def get_extra_state(self) -> Tensor:
        """The bank, for checkpoints."""
        return self.bank

    def set_extra_state(self, state: Tensor) -> None:
        """Take a bank over."""
        self.bank = state


def too_early(use: str) -> RuntimeError:
    """The error of pseudo samples that are used before they were crafted."""
    return RuntimeError(f"Call `regenerate` (or add PseudoSampleRegeneration to the callbacks) before {use}.")


def noise_for(images: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise `(rows, ...)` of the shape of images, or features, `(B, ...)`, on their device, float32."""
    shape = (rows, *images.shape[1:])
    return torch.randn(shape, generator=generator, device=images.device, dtype=torch.float32)


def project(perturbations: Tensor, rms: float) -> Tensor:
    """Scale perturbations `(K, C, H, W)` down to a root mean square of at most ``rms``; smaller ones stay."""
    size = perturbations.flatten(1).square().mean(dim=1).sqrt().clamp(min=1e-12)
    return perturbations * (rms / size).clamp(max=1.0).view(-1, 1, 1, 1)


def root_mean_square(rows: Tensor) -> Tensor:
    """That of each row `(N, ...)`, `(N, 1, ...)`, never 0."""
    return rows.square().mean(dim=tuple(range(1, rows.dim())), keepdim=True).sqrt().clamp(min=1e-12)


def descended(rows: Tensor, gradients: Tensor, bounds: Tensor, steps: int) -> Tensor:
    """Rows `(N, ...)` after one of so many steps against their gradients, each scaled back to its bound.

    Args:
        rows: perturbations of images or features.
        gradients: of the same shape; only their directions count.
        bounds: on the root mean square of a row: one, or `(N, 1, ...)`.
        steps: of the whole descent, which is 2.5 times the bound long, as for :func:`step_size`.
    """
    moved = rows - 2.5 / steps * bounds * gradients / root_mean_square(gradients)
    return moved * (bounds / root_mean_square(moved)).clamp(max=1.0)


def step_size(rms: float, steps: int, images: Tensor) -> float:
    """Length of a gradient step on perturbations of images `(B, C, H, W)`."""
    # 2.5 times the radius over all steps, as projected gradient descent usually takes (Madry et al., ICLR 2018).
    return 2.5 * rms * math.sqrt(images[0].numel()) / max(1, steps)
