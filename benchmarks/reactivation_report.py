"""What ``reactivation.py`` found: a column for the table of the settings, and a figure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

NEVER = "never_poisoned"
_ACROSS = 5
Cell = Mapping[str, Any]


def awake(found: Iterable[Cell]) -> dict[tuple[str, str], list[float]]:
    """ASR in percent after re-activation, over the seeds, by setting and defence."""
    result: dict[tuple[str, str], list[float]] = {}
    for cell in found:
        if "asr" in cell:
            result.setdefault((cell["setting"], cell["defense"]), []).append(100 * cell["asr"])
    return result


def figure(before: Sequence[Cell], after: Sequence[Cell], path: Path) -> None:
    """A setting a column: ASR of each defence as it left the model (open) and after re-activation (full).

    The dotted line is a model that was never poisoned, after the same fine-tuning.

    Args:
        before: cells of ``settings.py``.
        after: cells of ``reactivation.py``.
        path: file to draw into.
    """
    old, new = awake(before), awake(after)
    settings = sorted({setting for setting, _ in new})
    if not settings:
        raise SystemExit("No such cell; run benchmarks/reactivation.py first.")
    names = sorted({defense for _, defense in new} - {NEVER})
    across = min(len(settings), _ACROSS)
    down = -(-len(settings) // across)
    drawing = Figure(figsize=(2.4 * across + 1.5, down * (0.3 * len(names) + 1.4)), layout="constrained")
    places = drawing.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axes in places[len(settings) :]:
        axes.set_axis_off()
    for axes, setting in zip(places, settings, strict=False):
        for row, name in enumerate(names):
            _arrow(axes, row, old.get((setting, name), []), new.get((setting, name), []), name.startswith("nba"))
        if anew := new.get((setting, NEVER)):
            axes.axvline(statistics.mean(anew), color="#555555", lw=1, ls=":", label="never poisoned")
        axes.set_title(setting)
        axes.set_xlabel("ASR in %")
        axes.set_xlim(-4, 104)
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=130, facecolor="white", bbox_inches="tight")


def _arrow(axes: Axes, row: int, before: Sequence[float], after: Sequence[float], ours: bool) -> None:
    if not after:
        return
    colour, end = "#c8442f" if ours else "#1f77b4", statistics.mean(after)
    if before:
        start = statistics.mean(before)
        axes.plot([start, end], [row, row], color=colour, lw=1)
        axes.plot(start, row, "o", color=colour, mfc="white")
    axes.plot(end, row, "o", color=colour)
