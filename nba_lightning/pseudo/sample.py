"""One perturbation for each image."""

import torch
from torch import Tensor, nn

from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Disagreement, PseudoSamples, noise_for, project, step_size


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
        perturbations = project(noise_for(images, len(images), generator), self.rms) * 0.1
        owner = torch.arange(len(images), device=images.device)
        with evaluating(student, teacher):
            for _ in range(self.steps):
                gradients = self._gradients(student, teacher, images, perturbations, owner)
                perturbations = self._ascend(perturbations, gradients, step_size(self.rms, self.steps, images))
        return perturbations.to(images.dtype)
