"""Pseudo samples of several sources in one batch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, expected
from nba_lightning.pseudo.base import PseudoSamples, Reduce, repeated, same


class Together(PseudoSamples):
    """Each image gets a pseudo sample of one source.

    Args:
        sources: the sources.
        shares: share of the images for each, in any unit; ``None`` for equal ones.

    Raises:
        ValueError: for no source, shares of another number, or a negative one.
    """

    def __init__(self, sources: Sequence[PseudoSamples], shares: Sequence[float] | None = None) -> None:
        nn.Module.__init__(self)
        shares = [1.0] * len(sources) if shares is None else list(shares)
        if not sources or len(shares) != len(sources) or sum(shares) <= 0:
            raise expected("shares", f"{len(sources)} shares, one for each source", shares)
        for share in shares:
            check_at_least("shares", share, 0.0)
        self.sources, self.shares = nn.ModuleList(sources), [share / sum(shares) for share in shares]

    def regenerate(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Iterable[Tensor],
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> None:
        """Renew each source; see :meth:`PseudoSamples.regenerate`."""
        endless = batches if isinstance(batches, Iterator) else repeated(batches)
        for source in self.sources:
            assert isinstance(source, PseudoSamples)
            source.regenerate(student, teacher, endless, generator, reduce)

    def passes(self, batch: int, num_classes: int) -> int:
        """See :meth:`PseudoSamples.passes`."""
        return sum(source.passes(batch, num_classes) for source in self.sources if isinstance(source, PseudoSamples))

    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Perturbations `(B, C, H, W)`: the first images by the first source, and so on; loaders shuffle."""
        ends = [round(len(images) * share) for share in torch.tensor(self.shares).cumsum(0).tolist()]
        parts = [
            source(images[start:end], student, teacher, generator)
            for source, start, end in zip(self.sources, chain([0], ends), ends, strict=False)
            if end > start
        ]
        return torch.cat(parts) if parts else torch.zeros_like(images)
