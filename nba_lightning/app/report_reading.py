"""Reading ``report.json``, whose form :mod:`nba_lightning.app.report` says, with errors that name the entry."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nba_lightning.core.checks import expected

NETWORKS = ("suspicious", "teacher", "cleaned")
"""In the order of the chain."""


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers in [0, 1], on so many images."""

    value: float
    standard_error: float | None = None
    images: int | None = None
    held_out: bool | None = None
    per_class: Mapping[str, "Accuracy"] = field(default_factory=dict)


@dataclass(frozen=True)
class ScanRow:
    """What a scan found for one class; ``None`` where it found no number."""

    label: str
    statistic: float | None
    p_value: float | None


@dataclass(frozen=True)
class Scan:
    """Rows of each method, what was said of them, and the level up to which a p-value is called unusual."""

    methods: Mapping[str, Sequence[ScanRow]]
    verdicts: Mapping[str, str]
    level: float

    def unusual(self) -> dict[str, dict[str, float]]:
        """From the label of each class that is reached unusually easily to the p-values that say so, by method."""
        found: dict[str, dict[str, float]] = {}
        for method, rows in self.methods.items():
            for row in rows:
                if row.p_value is not None and row.p_value <= self.level:
                    found.setdefault(row.label, {})[method] = row.p_value
        return dict(sorted(found.items(), key=lambda item: min(item[1].values())))

    def smallest(self) -> float | None:
        """The smallest p-value of all."""
        found = [row.p_value for rows in self.methods.values() for row in rows if row.p_value is not None]
        return min(found, default=None)


class Entry:
    """An object of the JSON and where it stands in it, so that errors can name what they mean."""

    def __init__(self, value: Any, path: str, file: str) -> None:
        self.path, self.file = path, file
        if not isinstance(value, dict):
            raise self.wrong("", "an object", value)
        self.values: dict[str, Any] = value

    def wrong(self, key: str, what: str, got: Any) -> ValueError:
        """The error about one of its entries."""
        name = ".".join(part for part in (self.path, key) if part) or self.file
        shown = "none" if got is None else json.dumps(got)
        return expected(name, f"{what} in {self.file}", shown if len(shown) < 60 else f"{shown[:57]}...")

    def number(self, key: str, low: float, high: float = math.inf) -> float | None:
        """A number in [low, high], if it is there."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not (low <= value <= high):
            raise self.wrong(key, f"a number of at least {low:g}" if math.isinf(high) else _in(low, high), value)
        return float(value)

    def needed(self, key: str, low: float, high: float) -> float:
        """A number that must be there."""
        value = self.number(key, low, high)
        if value is None:
            raise self.wrong(key, _in(low, high), None)
        return value

    def text(self, key: str) -> str | None:
        """A text, if it is there."""
        value: str | None = self._of_type(key, str, "a text")
        return value

    def flag(self, key: str) -> bool | None:
        """True or false, if it is there."""
        value: bool | None = self._of_type(key, bool, "true or false")
        return value

    def child(self, key: str) -> "Entry | None":
        """An object, if it is there."""
        return self._entry(self.values[key], key) if self.values.get(key) is not None else None

    def children(self, key: str) -> list["Entry"]:
        """The objects of a list; none if it is not there."""
        found = self._of_type(key, list, "a list") or []
        return [self._entry(value, f"{key}[{i}]") for i, value in enumerate(found)]

    def texts(self, key: str) -> list[str]:
        """The texts of a list; none if it is not there."""
        found: list[Any] = self._of_type(key, list, "a list") or []
        return [value if isinstance(value, str) else json.dumps(value) for value in found]

    def label(self, key: str, names: Sequence[str]) -> str:
        """What a class is called: its name, or its number where it has none or the name is another number."""
        value = self.values.get(key)
        if isinstance(value, str) and value in names:
            value = names.index(value)
        if isinstance(value, int) and not isinstance(value, bool):
            name = names[value] if 0 <= value < len(names) else str(value)
            return f"{value} (named {name})" if name.isdecimal() and name != str(value) else name
        if not isinstance(value, str):
            raise self.wrong(key, "a class, as a name or a number,", value)
        return value

    def _entry(self, value: Any, key: str) -> "Entry":
        return Entry(value, ".".join(part for part in (self.path, key) if part), self.file)

    def _of_type(self, key: str, kind: type, what: str) -> Any:
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise self.wrong(key, what, value)
        return value


def _in(low: float, high: float) -> str:
    return f"a number in [{low:g}, {high:g}]"


def read_json(path: Path, name: str) -> Entry:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        name: what it is called in errors about its entries.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected `{name}` to be in the folder that `clean` wrote, but there is no {str(path)!r}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise expected(name, "a whole JSON file", f"a broken one, {str(path)!r} ({error})") from error
    return Entry(content, "", name)


def read_accuracy(root: Entry, names: Sequence[str]) -> dict[str, Accuracy]:
    """The accuracy of each network; that of the suspicious and of the cleaned one must be there."""
    found = root.child("accuracy")
    if found is None:
        raise root.wrong("accuracy", "an object", None)
    entries = {name: found.child(name) for name in NETWORKS}
    for name in ("suspicious", "cleaned"):
        if entries[name] is None:
            raise found.wrong(name, "an object", None)
    return {name: _accuracy(entry, names) for name, entry in entries.items() if entry is not None}


def _accuracy(entry: Entry, names: Sequence[str]) -> Accuracy:
    images = entry.number("images", 0)
    return Accuracy(
        entry.needed("value", 0.0, 1.0),
        entry.number("standard_error", 0.0),
        None if images is None else int(images),
        entry.flag("held_out"),
        {one.label("class", names): _accuracy(one, names) for one in entry.children("per_class")},
    )


def read_scan(entry: Entry, names: Sequence[str]) -> Scan:
    """One scan, before or after, of any number of methods."""
    methods: dict[str, list[ScanRow]] = {}
    for method, row in _rows(entry):
        statistic: Any = row.values.get("statistic")  # where nothing reaches the class, it need not be a finite number
        is_number = isinstance(statistic, int | float) and math.isfinite(statistic)
        found = ScanRow(
            row.label("class", names), float(statistic) if is_number else None, row.number("p_value", 0.0, 1.0)
        )
        methods.setdefault(row.text("method") or method, []).append(found)
    verdict = entry.values.get("verdict")
    said = verdict if isinstance(verdict, dict) else {"": verdict}
    level = entry.number("level", 0.0, 1.0)
    verdicts = {name: text for name, text in said.items() if isinstance(text, str)}
    return Scan(methods, verdicts, 0.05 if level is None else level)


def _rows(entry: Entry) -> Iterator[tuple[str, Entry]]:
    if isinstance(entry.values.get("classes"), list):
        yield from (("scan", row) for row in entry.children("classes"))
    elif by_method := entry.child("classes"):
        yield from ((method, row) for method in by_method.values for row in by_method.children(method))


def plain(value: Any) -> str:
    """A plain value as somebody would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    return "none" if value is None else str(value)
