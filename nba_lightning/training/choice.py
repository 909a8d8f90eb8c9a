"""Which of the networks that verification looked at is kept, and what is said of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from nba_lightning.training.evidence import Evidence
from nba_lightning.training.ways import DIRECT, HALFWAY, OVER, Place


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
    than another by more than chance; then the one that is right on most. Where the way to the student was all that was
    looked at, the furthest on it, unless the teacher is right on more by more than chance. If the one that is right on
    most lost too much, the one that lost less and gives back least, which does not pass.

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
    if all(one.way == OVER for one in found[:-1]):
        return next(one for one in passing if one.right >= best.right - chance)
    least = max(found[-1].right, best.right - chance, least_right)
    return next((one for one in passing if one.way == HALFWAY and one.right >= least), best)


def sentence_of(kept: Found, evidence: Evidence) -> str:
    """What is kept of the suspicious network, and by what evidence."""
    came_in, taught = evidence.rates["suspicious"], evidence.rates["teacher"]
    worst = max(range(len(came_in)), key=lambda n: came_in[n] - taught[n])
    r, now = kept.r, evidence.rates.get(f"{kept.way} {kept.r:g}", taught)[worst]
    means = "patches win" if bool(evidence.patches[worst]) else "small perturbations win"
    told = (
        f"{means} class {int(evidence.classes[worst])} {100 * came_in[worst]:.0f} % of the images from "
        f"the suspicious network, {100 * taught[worst]:.1f} % from the teacher and {100 * now:.1f} % from the network "
        "that is kept."
    )
    sighted = bool(evidence.suspects.any())
    if not kept.passes and not sighted:
        told += " Half of what the student learned would be safer, but lost too much accuracy."
    elif not kept.passes:
        told += (
            f" That is more than may come back ({100 * kept.back:.0f} % of what tells the backdoor), but what passes "
            "lost too much accuracy."
        )
    if not sighted:
        told += " No class stands out, so a backdoor that is there would not have been seen."
    straight = f"{100 * r:.0f} % of the way from the teacher back to the suspicious network is kept"
    if kept.way == HALFWAY:
        what = f"the mean of the student and of {straight}"
    elif kept.way == DIRECT:
        what = straight
    elif r:
        more = f", and {100 * (r - 1):.0f} % of the way from the student on to it" if r > 1 else ""
        what = f"{100 * min(r, 1.0):.0f} % of what the student learned from the suspicious network is kept{more}"
    else:
        what = "nothing of the suspicious network is kept, what is left is the teacher"
    return f"Verified: {what}; {told}"
