"""Which of the networks that verification looked at is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from nba_lightning.training.ways import HALFWAY, Place


@dataclass(frozen=True)
class Found:
    """A network that was looked at.

    Attributes:
        way: which; empty for the teacher.
        r: how far on it.
        place: where it lies.
        back: share of the gap of suspected classes that it gives back.
        passes: whether that, and what other classes win, is within the margins.
        right: its accuracy on held-out images; 0 where there are none, and if it may not be kept.
    """

    way: str
    r: float
    place: Place
    back: float
    passes: bool
    right: float


def choose(found: Sequence[Found], least_right: float, chance: float, most: float) -> Found:
    """The one that is kept.

    Of those that pass the mean of student and straight way, unless it is right on fewer images than the teacher, or
    than another by more than chance; then the one that is right on most. If that lost too much, the one that lost less
    and gives back least, which does not pass.

    Args:
        found: networks on the ways, and the teacher, which passes, as the last.
        least_right: accuracy that is asked for, in [0, 1].
        chance: how far accuracies may differ by chance.
        most: share of the gap that may come back where accuracy asks for it.
    """
    passing = [one for one in found if one.passes]
    best = max(passing, key=lambda one: one.right)
    if best.right < least_right:
        enough = [one for one in found if one.right >= least_right and one.back <= most]
        return min(enough, key=lambda one: one.back, default=best)
    least = max(found[-1].right, best.right - chance, least_right)
    return next((one for one in passing if one.way == HALFWAY and one.right >= least), best)
