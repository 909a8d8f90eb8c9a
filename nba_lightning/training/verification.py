"""How much of the suspicious network's knowledge can be kept without its backdoor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.training.choice import Found, choose, sentence_of
from nba_lightning.training.reached import STILL_REACHED, passes_of_reached, still_reached
from nba_lightning.training.search import Search
from nba_lightning.training.sweep import FEW_IMAGES, allowed_loss, least_accuracy
from nba_lightning.training.ways import DIRECT, HALFWAY, OVER, place_on, set_at

_LESS_AGREEMENT = 0.01
"""How much less often than the teacher a network may agree with the suspicious one, for chance."""
_TEACHERS_MARGIN = 0.01
"""The margin between teachers: what one gives back no student takes away again, so it is asked for more."""

_IMAGES_BY_CHANCE = 4
"""Images that may come back of few, where they are more than the margin."""


class Verification:
    r"""Keep as much of the suspicious network's knowledge as shows no sign of the backdoor, without knowing a trigger.

    A backdoor makes the target class easy to reach, and a network that has learned it falls for what the suspicious
    network :math:`S_0` falls for and the teacher T withstands (:class:`~nba_lightning.training.search.Search`).
    Networks lie on three ways: straight, over the student S and past it, and half way between both,

    .. math:: T + r (S_0 - T), \qquad T + r (S - T) \; (r \le 1), \quad S + (r - 1) (S_0 - S) \; (r > 1) \qquad
        \textrm{and} \qquad \tfrac12 S + \tfrac12 (T + r (S_0 - T))

    On each way, from the largest r down, the first network is found from which no suspected class wins more images than
    from the teacher, but for ``margin`` of the gap between teacher and :math:`S_0`, and no other class more than
    ``margin_elsewhere`` of the images or half of its gap. The fewer images there are, the worse perturbations show the
    backdoor, and the less may come back: with n of the N images that the search takes n/N of the margin. The network
    must also agree with the suspicious one on clean images as often as the teacher does: weights that are far apart
    may have nothing but ruins between them.

    Of the three the one half way is kept, unless it is right on fewer of the images held out than the teacher, or than
    another by more than their standard error; then the one that is right on most of them, the teacher among them. If
    that lost more than the owner can do without, the network of the direct way takes its place that gives back least of
    those that did not, if it is no more than ``most`` of the gap, whatever other classes win; the owner is warned.
    (Of a backdoor that a student has learned the perturbations show less, so no other way may give more.)

    Where no class is suspected only the ``few`` places on the way to the student are looked at, half of it at most,
    where a backdoor that the student has learned hardly is yet; with ``whole`` the whole student is kept if half of the
    way lost too much accuracy. Of fewer than ``least_images`` clean images, which tell little, the student learns
    little of a backdoor either: the whole student is looked at, and these places if it does not pass; the whole margin
    may come back, or four images where they are more. BatchNorm statistics are mixed like the weights; estimated anew
    on plain images they would not be those of the mixture with pseudo samples on which all were learned.

    Ours; what led to the thresholds is in ``benchmarks/METHOD.md``. Weights between a network and what was fine-tuned
    from it are as in Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022 (arXiv 2109.01903), section
    3, means of several such networks as in Wortsman et al., "Model soups", ICML 2022 (arXiv 2203.05482). What it cannot
    see: a backdoor whose trigger neither a small perturbation of the image nor a patch in a cell of a grid resembles.

    Args:
        shares: r of the way over the student, in (0, 2], from the largest to the smallest.
        direct: r of the direct way, in (0, 1], from the largest to the smallest.
        halfway: likewise, of the way half way between that and the student.
        few: r of the way to the student, in (0, 1], from the largest to the smallest, where little can be told.
        margin: see above; a share of the gap, in [0, 1], for as many images as the search takes.
        margin_elsewhere: see above; a share of the images.
        max_loss: accuracy on held-out images that the owner can do without, in [0, 1]; chance is allowed for by
            :func:`~nba_lightning.training.sweep.allowed_loss`.
        most: share of the gap that may come back where accuracy asks for it, in [0, 1]; in proportion like ``margin``.
        search: how evidence is looked for.
        least_images: clean images of each process of which fewer are few.
        whole: see above; without it a network may be kept that lost too much, for whom there may be a gentler teacher.

    Attributes:
        rates: shares of the images that each perturbation and patch won, of every network that was looked at.
        suspected: the classes that stood out.
        to_unlearn: the classes that :class:`~nba_lightning.defenses.Unlearning` is for: these, or where none stood out
            all that were looked at, unless there are few images.
        came_back: share of the gap that came back, where accuracy asked for what does not pass; else 0.
        sentence: what was kept, and why.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        shares: Sequence[float] = (1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25),
        direct: Sequence[float] = (0.75, 0.6, 0.45, 0.3, 0.15),
        halfway: Sequence[float] = (0.75, 0.6, 0.45, 0.3, 0.15),
        few: Sequence[float] = (0.5, 0.25),
        margin: float = 0.04,
        margin_elsewhere: float = 0.1,
        max_loss: float = 0.05,
        most: float = 0.25,
        search: Search | None = None,
        least_images: int = FEW_IMAGES,
        whole: bool = True,
    ) -> None:
        for name, way in {"shares": shares, "direct": direct, "halfway": halfway, "few": few}.items():
            for share in way:
                check_range(name, share, 0.0, 2.0 if name == "shares" else 1.0, open_low=True)
            if sorted(way, reverse=True) != list(way):
                raise expected(name, "from the largest to the smallest", list(way))
        limits = {"margin": margin, "margin_elsewhere": margin_elsewhere, "max_loss": max_loss, "most": most}
        for name, limit in limits.items():
            check_range(name, limit, 0.0, 1.0)
        check_at_least("least_images", least_images, 0)
        self.shares, self.direct, self.halfway, self.few = list(shares), list(direct), list(halfway), list(few)
        self.least_images = least_images
        self.margin, self.margin_elsewhere, self.search = margin, margin_elsewhere, search or Search()
        self.max_loss, self.most, self.whole = max_loss, most, whole
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        """What was found, which a fit that goes on after it cannot find again."""
        names = ("rates", "suspected", "to_unlearn", "came_back", "sentence")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; what is missing is as before anything was looked for."""
        self.rates: dict[str, list[float]] = found.get("rates", {})
        self.suspected: list[int] = found.get("suspected", [])
        self.to_unlearn: list[int] = found.get("to_unlearn", [])
        self.came_back: float = found.get("came_back", 0.0)
        self.sentence: str = found.get("sentence", "")

    def can_tell(self, images: int) -> bool:
        """Whether so many clean images may tell enough to go further than half of the way to the student."""
        return images >= self.least_images

    def can_compare(self, teachers: int, witnessed: bool, images: int) -> bool:
        """Whether :meth:`withstanding` has several to tell apart, and images enough to do it."""
        return (teachers > 1 or witnessed) and self.can_tell(images)

    def margin_of(self, images: int) -> float:
        """The margin where there are so many clean images."""
        if self.can_tell(images):
            return self.margin * self._proportion(images)
        return max(self.margin, _IMAGES_BY_CHANCE / images)

    def _proportion(self, images: int) -> float:
        """Share of the images that the search takes."""
        return min(1.0, images / self.search.images)

    def passes_of_images(self, classes: int, images: int) -> int:
        """What it costs at most, for a network of so many classes and so many clean images; as ``Search.passes``."""
        several = max(len(self.shares) + len(self.direct) + len(self.halfway), 1 + len(self.few))
        return self.search.passes(classes, images, several if self.can_tell(images) else 1 + len(self.few))

    def passes_of_comparing(self, classes: int, images: int, teachers: int) -> int:
        """What :meth:`withstanding` costs at most, if one class is suspected; likewise."""
        return self.search.passes(classes, images, teachers) + passes_of_reached(classes, 1)

    def keep(
        self,
        student: nn.Module,
        teacher: nn.Module,
        suspicious: nn.Module,
        batches: Iterator[Tensor],
        one_pass: int,
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
        judge: Callable[[nn.Module], tuple[float, int]] = lambda network: (0.0, 0),
    ) -> float:
        """Leave in ``student`` what passes.

        Args:
            student: what learned from the suspicious network; changed in place.
            teacher: of the same architecture; what the student started from.
            suspicious: the suspicious network.
            batches: endless clean images `(B, C, H, W)` in [0, 1].
            one_pass: after how many batches they come again.
            generator: source of randomness, the same on all processes.
            reduce: averages a tensor over all processes.
            judge: accuracy of a network on clean images that nothing was fitted to, and their number; (0, 0) where
                there are none.

        Returns:
            r of what is kept; 0 if it is the teacher.
        """
        learned = {name: value.clone() for name, value in student.state_dict().items()}
        states = (teacher.state_dict(), learned, suspicious.state_dict())
        seen = one_pass * len(next(batches))
        rank_zero_info("Verifying: looking for what only the suspicious network falls for.")
        evidence, margin = self.search(suspicious, teacher, batches, one_pass, generator, reduce), self.margin_of(seen)
        sighted, few = bool(evidence.suspects.any()), not self.can_tell(seen)
        ways, furthest = {HALFWAY: self.halfway, DIRECT: self.direct, OVER: self.shares}, max(self.few, default=0.0)
        if few or not sighted:
            ways = {OVER: self.few if furthest == 1 or not (few or self.whole) else [1.0, *self.few]}
        least = evidence.agreement(teacher) - _LESS_AGREEMENT
        found: list[Found] = []
        for way, shares in ways.items():
            rank_zero_info(f"Verifying: how far one can go on the way '{way}', {len(shares)} places at most.")
            for r in shares:
                set_at(student, place := place_on(way, r), *states)
                if evidence.agreement(student) < least:
                    continue
                back, elsewhere = evidence.came_back(student, f"{way} {r:g}")
                # What is kept for accuracy's sake, if what passes lost too much.
                spare = way == DIRECT if sighted else r > furthest and not few
                passes = self._within(back, elsewhere, margin) and (sighted or not spare)
                right = judge(student)[0] if passes or spare else 0.0  # others may not be kept
                found.append(Found(way, r, place, back, passes, right))
                if passes:
                    break
        found.append(Found("", 0.0, (0.0, 0.0), 0.0, True, judge(teacher)[0]))
        before, images = judge(suspicious)
        least_right, chance = 0.0, 0.0
        if images:
            least_right = least_accuracy(before, images, self.max_loss)
            chance = allowed_loss(before, images, 0.0)
        kept = choose(found, least_right, chance, self.most * self._proportion(seen))
        set_at(student, kept.place, *states)
        self.rates, self.came_back = evidence.rates, 0.0 if kept.passes else kept.back
        self.sentence = sentence_of(kept, evidence)
        self.suspected = evidence.suspected
        self.to_unlearn = evidence.suspected if sighted or few else evidence.looked_at
        if few:
            self.sentence += f" {seen} clean images tell too little to look further; {self.least_images} would do."
        rank_zero_info(self.sentence)
        return kept.r

    def withstanding(
        self,
        teachers: Sequence[nn.Module],
        suspicious: nn.Module,
        batches: Iterator[Tensor],
        one_pass: int,
        generator: torch.Generator | None = None,
        witness: nn.Module | None = None,
    ) -> tuple[list[int], float]:
        """Which of several teachers withstand what the strongest withstands, and so may take its place.

        A strong teacher forgets more of the backdoor, and of all else. Where no class is suspected, or of too few
        images, nothing tells teachers apart, and only the strongest is safe.

        What a teacher has kept of the backdoor no evidence shows that it withstands itself. So a still stronger one
        bears witness where there is one, however much accuracy it lost: what it withstands is asked of all teachers.

        Args:
            teachers: at least one, of the suspicious network's architecture, the strongest first.
            suspicious: the suspicious network.
            batches: endless clean images `(B, C, H, W)` in [0, 1].
            one_pass: after how many batches they come again.
            generator: source of randomness.
            witness: a stronger teacher than all of them.

        Returns:
            Their places in ``teachers``, 0 among them; and about as much as the strongest has kept of the backdoor: of
            what the witness withstands the share that it falls for, or if that is more, and at least half, how easily
            suspected classes are :func:`~nba_lightning.training.reached.still_reached` from it. 0 where nothing tells.
        """
        seen = one_pass * len(next(batches))
        if not self.can_compare(len(teachers), witness is not None, seen):
            return [0], 0.0
        evidence = self.search(suspicious, witness or teachers[0], batches, one_pass, generator)
        if not bool(evidence.suspects.any()):
            return [0], 0.0
        margin = min(self.margin_of(seen), _TEACHERS_MARGIN)
        first = (0.0, 0.0) if witness is None else evidence.came_back(teachers[0], "teacher 0")
        kept, elsewhere = max(first[0], 0.0), max(first[1], self.margin_elsewhere)
        places = [0]
        for place, one in enumerate(teachers[1:], start=1):
            back, other = evidence.came_back(one, f"teacher {place}")
            if back <= kept + margin + 1e-6 and other <= elsewhere + 1e-6:
                places.append(place)
        reached = still_reached(teachers[0], suspicious, evidence.suspected, batches, generator)
        return places, max(kept, reached) if reached >= STILL_REACHED else kept

    def _within(self, suspected: float, elsewhere: float, margin: float) -> bool:
        return suspected <= margin + 1e-6 and elsewhere <= self.margin_elsewhere + 1e-6
