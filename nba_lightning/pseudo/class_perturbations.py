"""Perturbations that the student falls for and the teacher withstands, one for each class and size."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import KLDisagreement, PseudoSamples, Reduce, project, repeated, same

_AT_ONCE = 64
"""Images that go through the networks at once, about; all at once they would need more memory than training does."""


class ClassPerturbations(PseudoSamples):
    r"""Universal perturbations d, one for each class k and each size.

    They minimise, over clean images x,

    .. math:: CE(S(x + d), k) + CE(T(x + d), T(x))

    within a bound on their root mean square: S falls for the class, and T goes on saying what it says of x. They are
    continued from epoch to epoch. The bank travels in checkpoints and is the same on all processes.

    Args:
        sizes: bounds on the root mean square of a perturbation over its values, in units of the image range [0, 1].
        steps: gradient steps at each regeneration, one batch each.
        images_each: clean images for each perturbation in a step.
        classes: the classes k; all by default.

    Raises:
        ValueError: for no size, or one outside (0, 1], or no class.
    """

    def __init__(
        self,
        sizes: Sequence[float] = (0.018, 0.054),
        steps: int = 6,
        images_each: int = 8,
        classes: Sequence[int] | None = None,
    ) -> None:
        if not sizes:
            raise expected("sizes", "at least one bound", list(sizes))
        for size in sizes:
            check_range("sizes", size, 0.0, 1.0, open_low=True)
        super().__init__(max(sizes), steps, KLDisagreement())
        check_at_least("images_each", images_each, 1)
        if classes is not None and not len(classes):
            raise expected("classes", "at least one class, or None for all", list(classes))
        self.sizes, self.images_each, self.classes = list(sizes), images_each, classes
        self.bank = torch.empty(0)

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
        with evaluating(student, teacher):
            with torch.no_grad():
                number = predict(student, images[:1]).shape[1]
            classes = torch.tensor(range(number) if self.classes is None else self.classes, device=images.device)
            wanted = classes.repeat(len(self.sizes))
            bounds = torch.tensor(self.sizes, device=images.device).repeat_interleave(len(classes)).view(-1, 1, 1, 1)
            if self.bank.numel() == 0:
                shape = (len(wanted), *images.shape[1:])
                noise = torch.randn(shape, generator=generator, device=images.device)
                self.bank = project(noise, 1e-3) * 100 * bounds
            bank = self.bank.to(images.device)
            for step in range(self.steps):
                images = images if step == 0 else next(endless)
                size = (len(wanted) * self.images_each,)
                chosen = torch.randint(len(images), size, generator=generator, device=images.device)
                gradients = reduce(self._towards(student, teacher, images, chosen, bank, wanted))
                bank = _bounded(bank - 2.5 / self.steps * bounds * _unit_rms(gradients), bounds)
        self.bank = bank

    def passes(self, batch: int, num_classes: int) -> int:
        """See :meth:`PseudoSamples.passes`."""
        classes = num_classes if self.classes is None else len(self.classes)
        return 5 * self.steps * len(self.sizes) * classes * self.images_each + 1

    def _towards(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, chosen: Tensor, bank: Tensor, wanted: Tensor
    ) -> Tensor:
        """Gradients of what is minimised, `(N, C, H, W)`; ``chosen`` names ``images_each`` images of each in turn."""
        some = max(1, _AT_ONCE // self.images_each)
        parts = (
            self._gradients(student, teacher, images[own], bank[start : start + some], wanted[start : start + some])
            for start, own in zip(range(0, len(bank), some), torch.split(chosen, some * self.images_each), strict=True)
        )
        return torch.cat(list(parts))

    def _gradients(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, bank: Tensor, wanted: Tensor
    ) -> Tensor:
        owner = torch.arange(len(bank), device=images.device).repeat_interleave(self.images_each)
        with torch.no_grad():
            said = predict(teacher, images).argmax(dim=1)
        with torch.enable_grad():
            leaf = bank.detach().requires_grad_()
            inputs = (images + leaf[owner]).clamp(0.0, 1.0).to(images.dtype)
            falls = F.cross_entropy(predict(student, inputs).float(), wanted[owner], reduction="sum")
            stays = F.cross_entropy(predict(teacher, inputs).float(), said, reduction="sum")
            return torch.autograd.grad(GRADIENT_SCALE * (falls + stays), leaf)[0].float()

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
        owner = torch.randint(len(self.bank), (len(images),), generator=generator, device=images.device)
        return self.bank.to(images)[owner]

    def get_extra_state(self) -> Tensor:
        """The bank, for checkpoints."""
        return self.bank

    def set_extra_state(self, state: Tensor) -> None:
        """Take a bank over."""
        self.bank = state


def _rms(perturbations: Tensor) -> Tensor:
    return perturbations.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)


def _unit_rms(gradients: Tensor) -> Tensor:
    return gradients / _rms(gradients)


def _bounded(perturbations: Tensor, bounds: Tensor) -> Tensor:
    return perturbations * (bounds / _rms(perturbations)).clamp(max=1.0)
