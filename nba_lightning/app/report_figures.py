"""The geometry of the report's figures: where each number stands, in percent of a figure's width or height.

The templates draw them; labels keep their size on any screen since only positions scale.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nba_lightning.app.report_reading import Accuracy, Entry, ScanRow

_Z = 1.959964  # of a 95 % interval
_NAMES = {"acc": "held-out images"}  # as the figures of a fit's validation are called there


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from ``low`` to ``high``."""

    low: float
    high: float
    steps: tuple[float, ...]
    logarithmic: bool = False
    percent: bool = False

    def at(self, value: float) -> float:
        """Where a value stands, in percent of the length."""
        scale = math.log if self.logarithmic else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(100 * share, 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels."""
        return [(self.at(step), f"{100 * step:.0f}\u00a0%" if self.percent else f"{step:g}") for step in self.steps]


@dataclass(frozen=True)
class Span:
    """An accuracy with its interval, as values and as positions."""

    network: str
    value: float
    interval: tuple[float, float] | None
    x: float
    x_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Line:
    """A curve: its name, the path in a square of 100 x 100 and its last value."""

    name: str
    path: str
    last: str


@dataclass(frozen=True)
class Panel:
    """Curves of one kind in one fit."""

    title: str
    axis: Axis
    epochs: tuple[int, int]
    lines: list[Line]


def interval(accuracy: Accuracy) -> tuple[float, float] | None:
    r"""The 95 % interval of an accuracy, `None` where nothing says how many images it is from.

    Wilson's score interval (JASA 1927), which is not empty at 0 and 100 %, with the number of images that the standard
    error s stands for, :math:`n = p (1 - p) / s^2`.
    """
    p, s = accuracy.value, accuracy.standard_error
    n = p * (1 - p) / s**2 if s and 0 < p < 1 else accuracy.images
    if not n:
        return None
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_axis(values: Iterable[float]) -> Axis:
    """An axis of percent that ends at 100 and begins where the values need it."""
    low = max(0.0, min(0.9, math.floor(10 * min(values, default=0.0) + 1e-9) / 10))
    step = 0.25 if low == 0 else 0.2 if low < 0.4 else 0.1 if low < 0.8 else 0.05
    count = math.floor((1 - low) / step + 1e-9)
    return Axis(low, 1.0, tuple(1 - i * step for i in range(count, -1, -1)), percent=True)


def spans(rows: Mapping[str, Mapping[str, Accuracy]]) -> tuple[Axis, dict[str, list[Span]]]:
    """Rows of accuracies by network, on one axis."""
    found = {label: {name: (one, interval(one)) for name, one in row.items()} for label, row in rows.items()}
    axis = share_axis(ends[0] if ends else one.value for row in found.values() for one, ends in row.values())
    drawn = {
        label: [
            Span(name, one.value, ends, axis.at(one.value), (axis.at(ends[0]), axis.at(ends[1])) if ends else None)
            for name, (one, ends) in row.items()
        ]
        for label, row in found.items()
    }
    return axis, drawn


def number_axis(values: Sequence[float]) -> Axis:
    """An axis for any finite numbers, at least one, logarithmic where all are positive and far apart."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 4:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        nice = [base * 10.0**decade for decade in decades for base in ((1,) if high / low > 300 else (1, 2, 5))]
        low, high = low / (high / low) ** 0.03, high * (high / low) ** 0.03
        return Axis(low, high, tuple(step for step in nice if low <= step <= high), logarithmic=True)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - pad, high + pad
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(base for base in (5, 2, 1) if (high - low) / (base * step) >= 2)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Axis(low, high, tuple(float(f"{i * step:.12g}") for i in range(first, last + 1)))


def strip_axis(*scans: Sequence[ScanRow]) -> Axis | None:
    """The axis on which the statistics of scans with one method stand; none without a number."""
    values = [row.statistic for rows in scans for row in rows if row.statistic is not None]
    return number_axis(values) if values else None


def curves(rows: Sequence[Entry]) -> dict[str, list[Panel]]:
    """Panels of accuracies and of losses for each fit, in the order in which they come."""
    fits: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for row in rows:
        series = fits.setdefault(row.text("fit") or "fit", {})
        epoch = row.needed("epoch", 0, 1e9)
        for name, value in row.values.items():
            if ("acc" in name or "loss" in name) and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(name, []).append((epoch, float(value) if math.isfinite(value) else None))
    panels = {
        fit: [
            panel
            for title, word in (("accuracy", "acc"), ("loss", "loss"))
            if (panel := _panel(title, {name: points for name, points in series.items() if _kind(name) == word}))
        ]
        for fit, series in fits.items()
    }
    return {fit: found for fit, found in panels.items() if found}


def _kind(name: str) -> str:
    return "loss" if "loss" in name else "acc"


def _panel(title: str, series: Mapping[str, list[tuple[float, float | None]]]) -> Panel | None:
    values = [value for points in series.values() for _, value in points if value is not None]
    if not values:
        return None
    is_share = title == "accuracy" and min(values) >= 0 and max(values) <= 1
    axis = share_axis(values) if is_share else number_axis(values)
    epochs = [epoch for points in series.values() for epoch, _ in points]
    first, last = min(epochs), max(epochs)
    lines = []
    for name, points in series.items():
        placed = [
            None if value is None else (_within(epoch, first, last), round(100 - axis.at(value), 2))
            for epoch, value in points
        ]
        final = next((value for _, value in reversed(points) if value is not None), None)
        shown = "no number" if final is None else f"{100 * final:.1f}\u00a0%" if is_share else f"{final:.3g}"
        lines.append(Line(_NAMES.get(name, name), _path(placed), shown))
    return Panel(title, axis, (int(first), int(last)), lines)


def _within(epoch: float, first: float, last: float) -> float:
    return 50.0 if first == last else round(100 * (epoch - first) / (last - first), 2)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """A path through the points, broken where there is none; a point alone becomes a dot."""
    parts: list[str] = []
    pen_is_down = False
    for point in points:
        if point is not None:
            parts.append(f"{'L' if pen_is_down else 'M'}{point[0]:g} {point[1]:g}" + ("" if pen_is_down else "h0"))
        pen_is_down = point is not None
    return "".join(parts)
