"""Perturbations that the student falls for and the teacher withstands, one for each class and size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nba_lightning.core.checks import check_range, expected
from nba_lightning.pseudo.base import descended, noise_for, project
from nba_lightning.pseudo.per_class import PerClass


class ClassPerturbations(PerClass):
    r"""Universal perturbations d, one for each class k and each size.

    They minimise, over clean images x,

    .. math:: CE(S(x + d), k) + CE(T(x + d), T(x))

    within a bound on their root mean square; see :class:`~nba_lightning.pseudo.per_class.PerClass`.

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
        super().__init__(max(sizes), steps, images_each, classes)
        self.sizes = list(sizes)

    def rows_of(self, classes: Tensor) -> Tensor:
        """All classes at the first size, then at the next."""
        return classes.repeat(len(self.sizes))

    def show(self, images: Tensor, contents: Tensor, rows: Tensor) -> Tensor:
        """Add and clamp."""
        return (images + contents).clamp(0.0, 1.0).to(images.dtype)

    def _bounds(self, rows: int, device: torch.device) -> Tensor:
        return (
            torch.tensor(self.sizes, device=device, dtype=torch.float32)
            .repeat_interleave(rows // len(self.sizes))
            .view(-1, 1, 1, 1)
        )

    def _begin(self, images: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
        return project(noise_for(images, rows, generator), 1e-3) * 100 * self._bounds(rows, images.device)

    def _moved(self, bank: Tensor, gradients: Tensor, step: int) -> Tensor:
        bounds = self._bounds(len(bank), bank.device)
        return descended(bank, gradients, bounds, self.steps)
