"""What a scan found: a statistic and a p-value for each class, as plain JSON, and in one sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nba_lightning.core.checks import check_range, expected, is_plain
from nba_lightning.scan.statistics import Rule


@dataclass(frozen=True)
class ScanResult:
    """A statistic and a p-value for each class, and how they came about.

    Attributes:
        method: name of the scan, such as ``maximum_margin``.
        statistics: one positive number for each class; the larger, the more easily the class is reached.
        p_values: one for each class, in (0, 1], already adjusted for the number of classes: the chance that *any*
            class of a network without an outlier has a statistic this far above the others'.
        rule: the decision rule, in words.
        seconds: what it took.
        passes: images that went forwards or backwards through a network, as a measure of cost free of the machine.
        settings: the scan's arguments.
        details: further figures of the method, plain values.
        pictures: `(K, C, H, W)`, what reaches each class best: an input or a perturbation. Not in the JSON.
        examples: `(K, n, C, H, W)` in [0, 1], images that the perturbations turn. Not in the JSON.
    """

    method: str
    statistics: tuple[float, ...]
    p_values: tuple[float, ...]
    rule: str
    seconds: float = 0.0
    passes: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    pictures: Tensor | None = field(default=None, compare=False, repr=False)
    examples: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise unless there is one p-value for each statistic and all else is plain."""
        if len(self.statistics) != len(self.p_values):
            raise expected("p_values", f"as many as `statistics` ({len(self.statistics)})", len(self.p_values))
        for value in self.p_values:
            check_range("p_values", value, 0.0, 1.0)
        for name in ("settings", "details"):
            if not is_plain(dict(getattr(self, name))):
                raise expected(name, "made of plain values", getattr(self, name))

    @property
    def suspect(self) -> int:
        """The class with the smallest p-value; of several, that with the largest statistic."""
        return min(range(len(self.p_values)), key=lambda k: (self.p_values[k], -self.statistics[k]))

    @property
    def p_value(self) -> float:
        """The smallest p-value of all classes, which is that of the network."""
        return min(self.p_values)

    def judged_by(self, rule: Rule) -> "ScanResult":
        """The same statistics under another decision rule."""
        return replace(self, p_values=tuple(rule(self.statistics)), rule=rule.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        rows = zip(self.statistics, self.p_values, strict=True)
        return {
            "method": self.method,
            "verdict": sentence(self),
            "classes": [{"class": k, "statistic": s, "p_value": p} for k, (s, p) in enumerate(rows)],
            "rule": self.rule,
            "seconds": round(self.seconds, 2),
            "passes": self.passes,
            "settings": dict(self.settings),
            "details": dict(self.details),
        }

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "ScanResult":
        """The result that :meth:`to_dict` wrote, without its pictures."""
        rows = sorted(saved["classes"], key=lambda row: row["class"])
        return ScanResult(
            saved["method"],
            tuple(row["statistic"] for row in rows),
            tuple(row["p_value"] for row in rows),
            **{name: saved[name] for name in ("rule", "seconds", "passes", "settings", "details")},
        )


def sentence(result: ScanResult, level: float = 0.05, names: Sequence[str] | None = None) -> str:
    """What a result says, no more than it says: never that a network is backdoored, never that it is not.

    Args:
        result: of a scan.
        level: p-values up to it are called unusual, in (0, 1).
        names: of the classes; their numbers by default.

    Example:
        >>> sentence(ScanResult("maximum_margin", (1.0, 9.0, 1.1), (1.0, 0.004, 0.9), "a rule"))
        'Class 1 is reached unusually easily (p = 0.004).'
    """
    check_range("level", level, 0.0, 1.0, open_low=True, open_high=True)
    if names is not None and len(names) != len(result.p_values):
        raise expected("names", f"one for each of the {len(result.p_values)} classes", len(names))
    name = [str(k) for k in range(len(result.p_values))] if names is None else list(names)
    found = sorted((p, k) for k, p in enumerate(result.p_values) if p <= level)
    if not found:
        return f"No class is reached unusually easily (smallest {_p(result.p_value)}), which proves nothing."
    if len(found) == 1:
        return f"Class {name[found[0][1]]} is reached unusually easily ({_p(found[0][0])})."
    listed = [f"{name[k]} ({_p(p)})" for p, k in found]
    return f"Classes {', '.join(listed[:-1])} and {listed[-1]} are reached unusually easily."


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"
