"""A small bank of perturbations, each one for all images."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Banked, Disagreement, Reduce, noise_for, project, repeated, same, step_size


class UniversalPerturbations(Banked):
    """A small bank of perturbations, each one for all images, as a trigger is. Continued from epoch to epoch.

    Args:
        number: perturbations in the bank.
        rms: see :class:`PseudoSamples`.
        steps: gradient steps at each regeneration, one batch each; 0 leaves the noise that the bank begins as.
        disagreement: see :class:`PseudoSamples`.
        restart: start each regeneration from noise instead of from the last bank.
    """

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
        empty = self.bank.numel() == 0 or self.restart
        self.bank = self._noise(images, generator) if empty else self.bank.to(images.device)
        for step in range(self.steps):
            if step > 0:
                images = next(endless)
            owner = torch.arange(len(images), device=images.device) % self.number
            with evaluating(student, teacher):
                gradients = reduce(self._gradients(student, teacher, images, self.bank, owner))
            self.bank = self._ascend(self.bank, gradients, step_size(self.rms, self.steps, images))

    def passes(self, batch: int, num_classes: int) -> int:
        """See :meth:`PseudoSamples.passes`."""
        return 4 * self.steps * batch

    def _noise(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return project(noise_for(images, self.number, generator), self.rms) * 0.1

    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One perturbation of the bank for each image, drawn at random."""
        return self.bank.to(images)[self.drawn(images, generator)]
