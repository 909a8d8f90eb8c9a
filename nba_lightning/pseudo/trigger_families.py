"""Pseudo samples that carry a synthetic trigger."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Disagreement, KLDisagreement, PseudoSamples, Reduce, repeated, same
from nba_lightning.pseudo.families import Family, Parameters, all_families


class TriggerFamilies(PseudoSamples):
    """Images with synthetic triggers of many families, some of them found by a search, the others drawn anew.

    Each image gets a trigger of one family, the families in turn. At each regeneration a search draws ``candidates``
    triggers of each family, puts each on some clean images, and keeps the ``kept`` on which student and teacher
    disagree most; a share of the images gets one of these, the others a fresh draw. No true trigger is looked at.

    Args:
        families: the families; all of :mod:`nba_lightning.pseudo.families` by default.
        candidates: draws of each family in the search; 0 searches none.
        kept: draws of each family that the search keeps.
        found_share: share of the images that get a kept draw.
        images_each: clean images on which a candidate is tried.
        disagreement: what the search maximises; KL(teacher || student) by default.

    Raises:
        ValueError: for no family, more kept draws than candidates, or a share outside [0, 1].
    """

    def __init__(
        self,
        families: Sequence[Family] | None = None,
        candidates: int = 8,
        kept: int = 2,
        found_share: float = 0.5,
        images_each: int = 8,
        disagreement: Disagreement | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.families = all_families() if families is None else list(families)
        if not self.families:
            raise expected("families", "at least one family", families)
        check_at_least("candidates", candidates, 0)
        check_range("kept", kept, 1 if candidates else 0, max(1, candidates))
        check_range("found_share", found_share, 0.0, 1.0)
        check_at_least("images_each", images_each, 1)
        self.candidates, self.kept, self.found_share, self.images_each = candidates, kept, found_share, images_each
        self.disagreement = disagreement or KLDisagreement()
        self.found: list[Parameters] = []

    @torch.no_grad()
    def regenerate(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Iterable[Tensor],
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> None:
        """Search each family; see :meth:`PseudoSamples.regenerate`."""
        if not (self.candidates and self.found_share):
            return
        endless = batches if isinstance(batches, Iterator) else repeated(batches)
        with evaluating(student, teacher):
            self.found = [
                self._search(family, student, teacher, next(endless), generator, reduce) for family in self.families
            ]

    def passes(self, batch: int, num_classes: int) -> int:
        """See :meth:`PseudoSamples.passes`."""
        tried = self.candidates * self.images_each if self.found_share else 0
        return 2 * len(self.families) * tried

    def _search(
        self,
        family: Family,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        generator: torch.Generator | None,
        reduce: Reduce,
    ) -> Parameters:
        """The draws of one family with the largest mean disagreement."""
        draws = family.draw(self.candidates, images, generator)
        owner = torch.arange(self.candidates, device=images.device).repeat_interleave(self.images_each)
        shape = (len(owner),)
        tried = images[torch.randint(len(images), shape, generator=generator, device=images.device)]
        triggered = family.apply(tried, {name: value[owner] for name, value in draws.items()}).clamp(0.0, 1.0)
        triggered = triggered.to(images.dtype)
        apart = self.disagreement(predict(student, triggered), predict(teacher, triggered))
        best = reduce(apart.view(self.candidates, -1).mean(dim=1)).topk(self.kept).indices
        return {name: value[best] for name, value in draws.items()}

    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What the triggers change in the images, `(B, C, H, W)`."""
        triggered, count = torch.empty_like(images), len(self.families)
        for number, family in enumerate(self.families):
            mine = images[number::count]
            found = round(self.found_share * len(mine)) if self.found else 0
            parts = [mine[:0]]
            if found:
                kept = {name: value.to(images.device) for name, value in self.found[number].items()}
                owner = torch.randint(self.kept, (found,), generator=generator, device=images.device)
                parts.append(family.apply(mine[:found], {name: value[owner] for name, value in kept.items()}))
            if found < len(mine):
                parts.append(family.apply(mine[found:], family.draw(len(mine) - found, images, generator)))
            triggered[number::count] = torch.cat(parts).to(images.dtype)
        return triggered - images

    def get_extra_state(self) -> list[Parameters]:
        """The draws that were found, for checkpoints; their number is not known before the first search."""
        return self.found

    def set_extra_state(self, state: list[Parameters]) -> None:
        """Take found draws over."""
        self.found = list(state)
