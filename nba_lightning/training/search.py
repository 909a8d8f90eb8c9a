"""The search for evidence of a backdoor, without a trigger."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.pseudo.class_patches import ClassPatches
from nba_lightning.pseudo.class_perturbations import ClassPerturbations
from nba_lightning.training.evidence import Evidence, won
from nba_lightning.training.moved import most_moved

_BY_NATURE = 0.05
"""Share of the images that any class may win by nature."""
_WON_AT_LAST = 0.75
"""Share of the images that the largest perturbation of a suspected class must win more from the suspicious network; of
a class that is merely near it was 62 % at most, of the target 87 at least."""
_WON_BY_PATCH = 0.8
"""Share of the images that a patch must win more from the suspicious network; by nature it was 61 % at most."""
_BY_PATCH_OF_SUSPECT = 0.5
"""The same for a class that perturbations suspect already."""
_IMAGES_OF_PATCH, _ASKED_OF_PATCHES = 4, 100
"""Images for each patch in a step of crafting, and on which all patches are tried."""
_PATCHES_EACH, _LEAST_OTHERS = 2, 16
"""Patches of a class that are kept, and of how many of the images that are asked it must not be the class."""
_VALUES_AT_ONCE = 2**24
"""Values of patches that are in memory at once, about."""


class Search:
    r"""Search for a class that is reached unusually easily from the suspicious network, and not from the teacher.

    For each class k a small universal perturbation :math:`d_k` is crafted that the suspicious network falls for and the
    teacher withstands. The *gap* of a class is on how many more of the images :math:`d_k` wins it from the suspicious
    network (a share s) than from the teacher (t); it stands out by

    .. math:: (s - t) / (t + 0.05)

    since a class that the teacher falls for as well is near by nature. Perturbations grow through ``sizes`` until the
    teacher falls for them on ``suspected`` of the images; those count whose first class is furthest ahead of the next.
    A class is *suspected* if its gap is above ``suspected`` and it stands out at least half as far as the first; the
    next larger perturbation, if there is one, counts for it too, and then one of both must win 75 % more from the
    suspicious network.

    A small bright trigger is not like any small perturbation, and a teacher that has learned to withstand perturbations
    may withstand these and not the trigger. So patches are crafted as well
    (:class:`~nba_lightning.pseudo.class_patches.ClassPatches`), and a class is suspected too if one of its patches wins
    80 % more of the images from the suspicious network than from the teacher; its two best ones count. (Perturbations
    for it are held to what those of other classes are, unless they stand out themselves.) Of a class that perturbations
    suspect already those patches count that win 50 % more.

    Args:
        suspected: see above; a share of the images, in [0, 1].
        sizes: bounds on the root mean square of a perturbation, in units of the image range [0, 1], rising.
        steps: gradient steps of crafting, one batch each.
        images_each: clean images for each perturbation in a step; for a patch they are four.
        images: clean images of each process on which falling for a suspected class is measured, if there are so many.
        images_elsewhere: likewise, for other classes.
        classes: how many classes are looked at in a network that has more; those to which synthetic triggers move the
            suspicious network most and the teacher least.
        grid: cells along each side of the image, each of which a patch may cover; 0 looks for no patches.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        suspected: float = 0.2,
        sizes: Sequence[float] = (0.018, 0.036, 0.072, 0.144),
        steps: int = 16,
        images_each: int = 24,
        images: int = 2000,
        images_elsewhere: int = 400,
        classes: int = 32,
        grid: int = 4,
    ) -> None:
        check_range("suspected", suspected, 0.0, 1.0)
        for name, number in {"images": images, "images_elsewhere": images_elsewhere, "classes": classes}.items():
            check_at_least(name, number, 1)
        check_at_least("grid", grid, 0)
        if not sizes or sorted(sizes) != list(sizes):
            raise expected("sizes", "at least one bound, rising", list(sizes))
        self.suspected, self.images, self.images_elsewhere = suspected, images, images_elsewhere
        self.sizes, self.steps, self.images_each, self.classes = list(sizes), steps, images_each, classes
        self.grid = grid

    def passes(self, classes: int, images: int, networks: int) -> int:
        """How many times an image goes forwards or backwards through a network, at most, if one class is suspected.

        Args:
            classes: of the network.
            images: clean images that there are.
            networks: that are asked beside the suspicious one and the teacher.
        """
        looked_at = min(classes, self.classes)
        crafting = 5 * self.steps * self.images_each * looked_at  # the teacher once, then both there and back
        asking = (looked_at + 2) * min(self.images_elsewhere, images)
        patches = self.grid**2 * looked_at * (5 * self.steps * _IMAGES_OF_PATCH + 2 * _ASKED_OF_PATCHES)
        asked = (networks + 2) * (asking + (4 + _PATCHES_EACH * bool(self.grid)) * min(self.images, images))
        return len(self.sizes) * (crafting + 2 * asking) + patches + asked

    def __call__(
        self,
        suspicious: nn.Module,
        teacher: nn.Module,
        batches: Iterator[Tensor],
        one_pass: int,
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> Evidence:
        """Craft perturbations and patches and ask both networks.

        Args:
            suspicious: the suspicious network.
            teacher: a network that has forgotten the backdoor.
            batches: endless clean images `(B, C, H, W)` in [0, 1].
            one_pass: after how many batches they come again.
            generator: source of randomness, the same on all processes.
            reduce: averages a tensor over all processes.
        """
        first = next(batches)
        looked_at = [first, *islice(batches, min(one_pass - 1, (self.images - 1) // len(first)))]
        few = 1 + (self.images_elsewhere - 1) // len(first)
        classes = most_moved(suspicious, teacher, looked_at[:few], self.classes, generator, reduce)

        def crafted(size: float, wanted: Tensor) -> Tensor:
            crafting = ClassPerturbations((size,), self.steps, self.images_each, wanted.tolist())
            crafting.regenerate(suspicious, teacher, batches, generator, reduce)
            return crafting.bank

        tried: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, size in enumerate(self.sizes, start=1):
            rank_zero_info(f"Searching: perturbations of {len(classes)} classes, size {number} of {len(self.sizes)}.")
            bank = crafted(size, classes)
            taught, came_in = (
                won(network, looked_at[:few], classes, bank, reduce) for network in (teacher, suspicious)
            )
            tried.append((bank, came_in - taught, (came_in - taught) / (taught + _BY_NATURE)))
            if bool((taught > self.suspected).any()):
                break
        best = max(range(len(tried)), key=lambda number: _lead(tried[number][2]))
        bank, gaps, stands_out = tried[best]
        suspects = (gaps > self.suspected) & (stands_out >= stands_out.max() / 2)
        larger = []
        if bool(suspects.any()) and best + 1 < len(self.sizes):
            there = best + 1 < len(tried)
            larger = [tried[best + 1][0][suspects] if there else crafted(self.sizes[best + 1], classes[suspects])]
        rows = [torch.cat([part, *(part[suspects] for _ in larger)]) for part in (classes, suspects)]
        found = Evidence(rows[0], torch.cat([bank, *larger]), rows[1], looked_at, few, reduce)
        if self.grid:
            at_once = max(1, _VALUES_AT_ONCE // (self.grid**2 * first[0].numel()))
            rank_zero_info(f"Searching: patches of {len(classes)} classes, {self.grid**2} places for each.")
            for part in torch.split(classes, at_once):
                crafting = ClassPatches(self.grid, self.steps, _IMAGES_OF_PATCH, part.tolist())
                crafting.regenerate(suspicious, teacher, batches, generator, reduce)
                _add_patches(found, crafting, part, suspicious, teacher)
        return _believed(found.of(suspicious, teacher), len(classes))


def _add_patches(
    evidence: Evidence, crafting: ClassPatches, classes: Tensor, suspicious: nn.Module, teacher: nn.Module
) -> None:
    """Add the best patches of each class, of those that win enough more from the suspicious network."""
    first, wanted = evidence.images[0], crafting.rows_of(classes)
    bank, covers = crafting.placed(first)
    asked = [torch.cat(evidence.images[: 1 + (_ASKED_OF_PATCHES - 1) // len(first)])[:_ASKED_OF_PATCHES]]
    taught, came_in = (won(network, asked, wanted, bank, evidence.reduce, covers) for network in (teacher, suspicious))
    with torch.no_grad(), evaluating(suspicious):
        others = (predict(suspicious, asked[0]).argmax(dim=1) != classes.unsqueeze(1)).sum(dim=1, keepdim=True)
    gaps = (came_in - taught).view(len(classes), -1) * (evidence.reduce(others.float()) >= _LEAST_OTHERS)
    best = gaps.topk(min(_PATCHES_EACH, gaps.shape[1]), dim=1)
    rows = best.indices + torch.arange(len(classes), device=gaps.device).unsqueeze(1) * gaps.shape[1]
    kept = rows[best.values > _least_gaps(evidence, classes)[:, None]]
    if evidence.covers is None:
        evidence.covers = covers.new_zeros((len(evidence.bank), *covers.shape[1:]))
    evidence.covers = torch.cat([evidence.covers, covers[kept]])
    evidence.bank = torch.cat([evidence.bank, bank[kept]])
    evidence.classes = torch.cat([evidence.classes, wanted[kept]])
    evidence.suspects = torch.cat([evidence.suspects, evidence.suspects.new_ones(len(kept))])


def _believed(found: Evidence, classes: int) -> Evidence:
    """The evidence without suspicions that came to too little; the first perturbation of each class stays."""
    dense = ~found.patches
    if int(dense.sum()) > classes:  # there are larger ones
        own = found.classes.unsqueeze(1) == found.classes[dense]
        most = torch.where(own, found.gaps[dense], 0.0).amax(dim=1)
        found.suspects = found.suspects & (found.patches | (most > _WON_AT_LAST))
    first = torch.arange(len(found.classes), device=found.classes.device) < classes
    enough = torch.where(found.patches, found.gaps > _least_gaps(found, found.classes), found.suspects)
    return found.only(first | enough)


def _least_gaps(evidence: Evidence, classes: Tensor) -> Tensor:
    """How much more patches for classes `(N,)` must win from the suspicious network."""
    suspected = torch.isin(classes, evidence.classes[evidence.suspects & ~evidence.patches])
    return torch.where(suspected, _BY_PATCH_OF_SUSPECT, _WON_BY_PATCH)


def _lead(stands_out: Tensor) -> float:
    """How far the first is ahead of the next."""
    first = stands_out.topk(min(2, len(stands_out))).values
    return float(first[0] - first[1:].sum())
