"""Patches that the student falls for and the teacher withstands, one for each class and cell of a grid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.pseudo.base import noise_for
from nba_lightning.pseudo.per_class import PerClass


class ClassPatches(PerClass):
    r"""Universal patches p, one for each class k and each cell of a grid that covers the image.

    They minimise, over clean images x and with m the cell,

    .. math:: CE(S((1 - m) x + m p), k) + CE(T((1 - m) x + m p), T(x))

    by steps along the sign of the gradient that become smaller linearly, bounded by the image range alone; see
    :class:`~nba_lightning.pseudo.per_class.PerClass`. A small bright trigger is within a cell, or a good part of it is,
    and no small perturbation of the whole image looks like it.

    Source: ours; a mask and a pattern that turn all images to a class are looked for by Neural Cleanse (Wang et al.,
    IEEE S&P 2019), over all masks and without a teacher.

    Args:
        grid: cells along each side of the image; of smaller images as many as they have pixels.
        steps: gradient steps at each regeneration, one batch each.
        images_each: clean images for each patch in a step.
        classes: the classes k; all by default.
        step_size: of the first step, in units of the image range [0, 1].

    Raises:
        ValueError: for no cell, a step outside (0, 1], or no class.
    """

    def __init__(
        self,
        grid: int = 4,
        steps: int = 16,
        images_each: int = 4,
        classes: Sequence[int] | None = None,
        step_size: float = 0.15,
    ) -> None:
        super().__init__(1.0, steps, images_each, classes)
        check_at_least("grid", grid, 1)
        check_range("step_size", step_size, 0.0, 1.0, open_low=True)
        self.grid, self.step_size = grid, step_size

    def rows_of(self, classes: Tensor) -> Tensor:
        """All cells of the first class, then of the next."""
        return classes.repeat_interleave(self.grid**2)

    def covers(self, images: Tensor, rows: Tensor) -> Tensor:
        """1 where the patches of rows `(N,)` cover images `(B, C, H, W)`, else 0: `(N, 1, H, W)`."""
        return cells_of(images.shape[2], images.shape[3], self.grid).to(images)[rows % self.grid**2]

    def placed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """All patches, 0 outside their cells `(N, C, H, W)`, and where each covers such images `(N, 1, H, W)`."""
        covers = self.covers(images, torch.arange(len(self.bank), device=self.bank.device)).to(self.bank)
        return self.bank * covers, covers

    def show(self, images: Tensor, contents: Tensor, rows: Tensor) -> Tensor:
        """Put the patches on."""
        covers = self.covers(images, rows)
        return covered(images, contents * covers, covers)

    def _begin(self, images: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
        return (0.5 + 0.1 * noise_for(images, rows, generator)).clamp(0.0, 1.0)

    def _moved(self, bank: Tensor, gradients: Tensor, step: int) -> Tensor:
        return (bank - self.step_size * (1 - step / self.steps) * gradients.sign()).clamp(0.0, 1.0)


def cells_of(height: int, width: int, grid: int) -> Tensor:
    """The cells of a grid as masks `(grid ** 2, 1, H, W)`, 1 inside and 0 outside; some are empty in tiny images."""
    rows, columns = (torch.arange(size) * grid // size for size in (height, width))
    numbers = torch.arange(grid)
    of_row, of_column = (places == numbers[:, None] for places in (rows, columns))
    return (of_row[:, None, :, None] & of_column[None, :, None, :]).flatten(0, 1).unsqueeze(1).float()


def covered(images: Tensor, contents: Tensor, covers: Tensor) -> Tensor:
    """Images `(B, C, H, W)`, gone where ``covers`` is 1, plus contents, in [0, 1] again; shapes broadcast."""
    return (images * (1 - covers) + contents).clamp(0.0, 1.0).to(images.dtype)
