"""Why the chain chose what it chose, in a sentence each, for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from nba_lightning.data.owner import CleanImages
from nba_lightning.training.sweep import TEACHERS_LOSS, teachers_loss

_OPTIMISERS = {
    "AdamW": "The network has layer or group normalisation or depthwise convolutions; they are trained adaptively.",
    "SGD": "The network has neither layer or group normalisation nor depthwise convolutions.",
}
_SWEPT = (
    "The strongest of those tried that cost at most {:.1f} points of accuracy on held-out images "
    f"({TEACHERS_LOSS:g} times what the cleaned network may lose, since the student learns a part of it back) or what "
    "chance may, or if none did the strongest that lost hardly more than the least; of gentler ones that withstand as "
    "much as it the most accurate."
)
_USUAL = "The usual one of this optimiser, since no images were held out to tell rates apart."


def reasons(
    chosen: Mapping[str, Any], data: CleanImages, steps: int, role: str, tried: Sequence[str], max_loss: float = 0.05
) -> dict[str, str]:
    """Sentences for those of the choices that need one.

    Args:
        chosen: what was chosen for the last fit, and ``teacher_rate``.
        data: the clean images.
        steps: of that fit, as they were asked for.
        role: ``teacher`` or ``student``, which that fit trained.
        tried: a sentence for each of the teacher's rates that was not taken.
        max_loss: accuracy that the cleaned network may lose.
    """
    training = len(data.training)
    swept = _SWEPT.format(100 * teachers_loss(max_loss))
    known = {
        "optimiser": _OPTIMISERS.get(chosen["optimiser"]),
        "rate": "A third of the teacher's." if role == "student" else "The teacher's.",
        "teacher_rate": " ".join([swept if len(data.held_out) else _USUAL, *tried]),
        "steps": f"Whole passes over {training:,} images, for at least the {steps:,} steps that were asked for.",
        "batch": "As it was asked for."
        if data.batch_size
        else f"A quarter of the {training:,} images to train on, at most 50.",
        "layers": "Where the student was made to behave as the teacher." if role == "student" else None,
        "accepted": _accepted(chosen.get("accepted")),
        "unlearned": "Small perturbations and patches for suspected classes, else for all, crafted anew and again.",
    }
    return {name: sentence for name, sentence in known.items() if sentence and name in chosen}


def _accepted(share: float | None) -> str:
    if share == 0:
        return "Nothing of the suspicious network passed verification: what is kept is the teacher."
    return (
        "How far from the teacher the network lies that is kept: on the way over the student (1 is it, more is "
        "beyond it), straight towards the suspicious network, or half way between; `verified` says which way."
    )
