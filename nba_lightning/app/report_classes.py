"""What the report shows class by class: accuracies, and the statistics of each method of the scan."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nba_lightning.app.report_figures import Axis, Span, spans, strip_axis
from nba_lightning.app.report_reading import Accuracy, Scan, ScanRow
from nba_lightning.app.report_sentences import METHODS

MOST = 20
"""Classes that are shown one by one; of more, those that matter most."""


@dataclass(frozen=True)
class Classes:
    """Accuracies of the classes that are shown, how many are not, and whether they were picked by what they lost."""

    axis: Axis
    rows: dict[str, list[Span]]
    images: dict[str, int | None]
    hidden: int


def by_class(accuracy: Mapping[str, Accuracy]) -> Classes | None:
    """Classes in their order; of many, those that lost most first."""
    found: dict[str, dict[str, Accuracy]] = {}
    for network, one in accuracy.items():
        for label, of_class in one.per_class.items():
            found.setdefault(label, {})[network] = of_class
    if not found:
        return None
    shown = list(found)
    if len(found) > MOST:
        shown = sorted(found, key=lambda label: _change(found[label]))[:MOST]
    axis, rows = spans({label: found[label] for label in shown})
    images = {
        label: next((one.images for one in found[label].values() if one.images is not None), None) for label in rows
    }
    return Classes(axis, rows, images, len(found) - len(shown))


def _change(row: Mapping[str, Accuracy]) -> float:
    return row["cleaned"].value - row["suspicious"].value if {"cleaned", "suspicious"} <= set(row) else 0.0


@dataclass(frozen=True)
class Method:
    """One method's rows before and after, by class, the axis of both, and what was said."""

    name: str
    about: str
    axis: Axis | None
    dots: dict[str, list[tuple[float, str, bool]]]
    unusual: dict[str, list[tuple[str, float]]]
    said: dict[str, str]
    rows: list[tuple[str, ScanRow | None, ScanRow | None]]
    hidden: int


def by_method(before: Scan | None, after: Scan | None) -> list[Method]:
    """The methods of both scans."""
    scans = {"before": before, "after": after}
    names = dict.fromkeys(name for scan in scans.values() if scan is not None for name in scan.methods)
    return [_method(name, {part: scan for part, scan in scans.items() if scan is not None}) for name in names]


def _method(name: str, scans: Mapping[str, Scan]) -> Method:
    rows = {part: {row.label: row for row in scan.methods.get(name, [])} for part, scan in scans.items()}
    axis = strip_axis(*(list(found.values()) for found in rows.values()))
    labels = list(dict.fromkeys(label for found in rows.values() for label in found))
    if len(labels) > MOST:
        labels.sort(key=lambda label: min(_rank(found.get(label)) for found in rows.values()))
    first, second = rows.get("before", {}), rows.get("after", {})
    return Method(
        name,
        METHODS.get(name, ("", ""))[0],
        axis,
        {part: _dots(axis, found.values(), scans[part].level) for part, found in rows.items() if found and axis},
        {part: _unusual(scan, name) for part, scan in scans.items()},
        {part: text for part, scan in scans.items() if (text := scan.verdicts.get(name))},
        [(label, first.get(label), second.get(label)) for label in labels[:MOST]],
        max(0, len(labels) - MOST),
    )


def _unusual(scan: Scan, method: str) -> list[tuple[str, float]]:
    """Classes that one method finds to be reached unusually easily, with their p-values."""
    return [(label, found[method]) for label, found in scan.unusual().items() if method in found]


def _rank(row: ScanRow | None) -> float:
    return 2.0 if row is None or row.p_value is None else row.p_value


def _dots(axis: Axis, rows: Iterable[ScanRow], level: float) -> list[tuple[float, str, bool]]:
    """Position, class, and whether it is unusual, the unusual last, so that they are drawn over the others."""
    dots = [(axis.at(row.statistic), row.label, _rank(row) <= level) for row in rows if row.statistic is not None]
    return sorted(dots, key=lambda dot: dot[2])
