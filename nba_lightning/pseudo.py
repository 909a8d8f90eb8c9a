"""Pseudo samples: clean images perturbed so that the student shows behaviour that the teacher does not share.

Crafted from clean images against the student and the frozen teacher alone; the true trigger is never seen.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from nba_lightning.adapters import predict
from nba_lightning.checks import check_at_least, check_range
from nba_lightning.functional import js_divergence, kl_divergence

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
        """See :func:`nba_lightning.functional.kl_divergence`."""
        return kl_divergence(teacher_logits, student_logits)


class JSDisagreement(Disagreement):
    """Jensen-Shannon divergence: two-sided and at most ln 2, so that no sample dominates."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """See :func:`nba_lightning.functional.js_divergence`."""
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

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Perturbations `(B, C, H, W)` for clean images `(B, C, H, W)` in [0, 1]; not yet clamped."""

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


class UniversalPerturbations(PseudoSamples):
    """A small bank of perturbations, each one for all images, as a trigger is. Continued from epoch to epoch.

    The bank is a buffer: it travels in checkpoints and is the same on all processes.

    Args:
        number: perturbations in the bank.
        rms: see :class:`PseudoSamples`.
        steps: gradient steps at each regeneration, one batch each; 0 leaves the noise that the bank begins as.
        disagreement: see :class:`PseudoSamples`.
        restart: start each regeneration from noise instead of from the last bank.
    """

    bank: Tensor

    def __init__(
        self,
        number: int = 1,
        rms: float = 0.018,
        steps: int = 10,
        disagreement: Disagreement | None = None,
        restart: bool = False,
    ) -> None:
        super().__init__(rms, steps, disagreement)
        check_at_least("number", number, 1)
        self.number, self.restart = number, restart
        self.register_buffer("bank", torch.empty(0))

    def regenerate(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Iterable[Tensor],
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> None:
        """Some gradient steps on the bank; see :meth:`PseudoSamples.regenerate`."""
        endless = batches if isinstance(batches, Iterator) else repeated(batches)
        images = next(endless)
        if self.bank.numel() == 0 or self.restart:
            self.bank = self._noise(images, generator)
        for step in range(self.steps):
            if step > 0:
                images = next(endless)
            owner = torch.arange(len(images), device=images.device) % self.number
            with evaluating(student, teacher):
                gradients = reduce(self._gradients(student, teacher, images, self.bank, owner))
            self.bank = self._ascend(self.bank, gradients, _step_size(self.rms, self.steps, images))

    def _noise(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (self.number, *images.shape[1:])
        noise = torch.randn(shape, generator=generator, device=images.device)
        return project(noise, self.rms) * 0.1

    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One perturbation of the bank for each image, drawn at random."""
        if self.bank.numel() == 0:
            raise RuntimeError("Call `regenerate` (or add PseudoSampleRegeneration to the callbacks) before sampling.")
        owner = torch.randint(self.number, (len(images),), generator=generator, device=images.device)
        return self.bank[owner].to(images.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        saved = state_dict.get(f"{prefix}bank")
        if saved is not None:
            self.bank = torch.empty_like(saved, device=self.bank.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SamplePerturbations(PseudoSamples):
    """One perturbation for each image, crafted anew in every step: stronger, and ``steps`` times dearer.

    The form of shared adversarial unlearning (Wei et al., NeurIPS 2023, arXiv 2307.10562), under our disagreement.

    Args:
        rms: see :class:`PseudoSamples`.
        steps: gradient steps for each batch.
        disagreement: see :class:`PseudoSamples`.
    """

    def __init__(self, rms: float = 0.0361, steps: int = 3, disagreement: Disagreement | None = None) -> None:
        super().__init__(rms, steps, disagreement)

    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Gradient steps from noise, both networks in ``eval`` mode."""
        if student is None or teacher is None:
            raise ValueError("Expected `student` and `teacher` to be networks for SamplePerturbations, but got None.")
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        perturbations = project(noise, self.rms) * 0.1
        owner = torch.arange(len(images), device=images.device)
        with evaluating(student, teacher):
            for _ in range(self.steps):
                gradients = self._gradients(student, teacher, images, perturbations, owner)
                perturbations = self._ascend(perturbations, gradients, _step_size(self.rms, self.steps, images))
        return perturbations.to(images.dtype)


class evaluating:  # noqa: N801
    """Context in which networks are in ``eval`` mode; each layer gets its own mode back behind it."""

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for network in self.networks for module in network.modules()]
        for network in self.networks:
            network.eval()

    def __exit__(self, *exception: object) -> None:
        for module, training in self.modes:
            module.training = training


def project(perturbations: Tensor, rms: float) -> Tensor:
    """Scale perturbations `(K, C, H, W)` down to a root mean square of at most ``rms``; smaller ones stay."""
    size = perturbations.flatten(1).square().mean(dim=1).sqrt().clamp(min=1e-12)
    return perturbations * (rms / size).clamp(max=1.0).view(-1, 1, 1, 1)


def _step_size(rms: float, steps: int, images: Tensor) -> float:
    # 2.5 times the radius over all steps, as projected gradient descent usually takes (Madry et al., ICLR 2018).
    return 2.5 * rms * math.sqrt(images[0].numel()) / max(1, steps)
