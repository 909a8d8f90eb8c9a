"""Tables and figure of the scan population; see ``scan.py``."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from common import cells
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from nba_lightning.scan import Conformal, ScanResult, StudentisedMaximum

matplotlib.use("Agg")
IMPLANTED = 0.5
"""Least ASR of a backdoor that counts; what is weaker is listed, not judged."""
LEAST_REFERENCES = 19


class Judged:
    """Networks of one data set under one method and one rule."""

    def __init__(self, rows: Sequence[dict[str, Any]], method: str, rule: str, level: float) -> None:
        self.method, self.rule = method, rule
        results = [(row, ScanResult.from_dict(row["scans"][method])) for row in rows]
        references = [result.statistics for row, result in results if row["attack"] == "clean" and not row["seed"] % 2]
        self.references = len(references)
        if rule == "conformal":
            judge = Conformal(references)
            results = [(row, result.judged_by(judge)) for row, result in results]
        else:
            results = [(row, result.judged_by(StudentisedMaximum())) for row, result in results]
        self.clean = [result for row, result in results if row["attack"] == "clean" and row["seed"] % 2]
        self.backdoored = [(row, result) for row, result in results if row.get("asr", 0.0) >= IMPLANTED]
        self.level = level

    def alarms(self) -> list[bool]:
        return [result.p_value <= self.level for result in self.clean]

    def found(self, attack: str | None = None) -> list[bool]:
        return [r.p_value <= self.level for row, r in self.backdoored if attack in (None, row["attack"])]

    def named(self) -> list[bool]:
        """Whether the right class is the most suspicious one, of all backdoored networks."""
        return [result.suspect == row["target"] for row, result in self.backdoored]

    def curve(self) -> tuple[list[int], list[float]]:
        labels = [0] * len(self.clean) + [1] * len(self.backdoored)
        return labels, [-r.p_value for r in [*self.clean, *(result for _, result in self.backdoored)]]


def report(results: Path, level: float = 0.05, figure: Path | None = None) -> str:
    """All tables, as Markdown; percent with exact 95 % intervals."""
    rows = list(cells(results))
    failed = [row for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    judged = {data: _judged([row for row in rows if row["data"] == data], level) for data in _names(rows, "data")}
    parts = [_population(rows), _table([j for some in judged.values() for j in some], judged, level)]
    parts += [_by_attack(data, some) for data, some in judged.items() if some]
    parts += [_costs(rows)]
    parts += [f"{len(failed)} failed: " + "; ".join(f"{r['attack']} {r['seed']}: {r['error']}" for r in failed)] * bool(
        failed
    )
    if figure is not None:
        _draw(judged, figure)
    return "\n\n".join(parts)


def _names(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _judged(rows: Sequence[dict[str, Any]], level: float) -> list[Judged]:
    clean = [row for row in rows if row["attack"] == "clean"]
    found = []
    for method in rows[0]["scans"]:
        for rule in ("studentised", "conformal"):
            if len([row for row in clean if not row["seed"] % 2]) >= (2 if rule == "conformal" else 0):
                found.append(Judged(rows, method, rule, level))
    return found


def _share(hits: Sequence[bool]) -> str:
    if not hits:
        return "none"
    low, high = stats.binomtest(sum(hits), len(hits)).proportion_ci()
    return f"{100 * sum(hits) / len(hits):.0f} ({100 * low:.0f} to {100 * high:.0f}) of {len(hits)}"


def _population(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("data", "attack", "networks", "ACC", "ASR", "teacher's ACC", "teacher's ASR", "ASR below 50 %")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for data, attack in dict.fromkeys((row["data"], row["attack"]) for row in rows):
        some = [row for row in rows if (row["data"], row["attack"]) == (data, attack)]
        teachers = [row["teacher"] for row in some]
        figures = [_range([p[key] for p in parts if key in p]) for parts in (some, teachers) for key in ("acc", "asr")]
        weak = sum(row.get("asr", 1.0) < IMPLANTED for row in some)
        lines.append(f"| {data} | {attack} | {len(some)} | {' | '.join(figures)} | {weak or ''} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{100 * statistics.mean(values):.0f} ({100 * min(values):.0f} to {100 * max(values):.0f})"


def _table(rows: Sequence[Judged], data: dict[str, list[Judged]], level: float) -> str:
    names = {id(j): name for name, some in data.items() for j in some}
    lines = [
        f"Alarms at a nominal {100 * level:g} %. References are clean networks with an even seed, false alarms are",
        "those of the others. Shares in percent, with exact 95 % intervals.",
        "",
        "| data | scan | rule | references | backdoors found | false alarms | right class first | AUC |",
        "|---" * 8 + "|",
    ]
    for j in rows:
        auc = f"{roc_auc_score(*j.curve()):.2f}" if j.clean and j.backdoored else "none"
        few = " (too few to alarm)" if j.rule == "conformal" and 1 / (j.references + 1) > j.level else ""
        used = f"{j.references}{few}" if j.rule == "conformal" else ""
        cells_ = [names[id(j)], j.method, j.rule, used, _share(j.found()), _share(j.alarms()), _share(j.named()), auc]
        lines.append(f"| {' | '.join(cells_)} |")
    return "\n".join(lines)


def _by_attack(data: str, judged: Sequence[Judged]) -> str:
    attacks = list(dict.fromkeys(row["attack"] for row, _ in judged[0].backdoored))
    lines = [
        f"Found of each attack, {data}:",
        "",
        f"| scan | rule | {' | '.join(attacks)} |",
        "|---" * (2 + len(attacks)) + "|",
    ]
    for j in judged:
        counts = [f"{sum(j.found(attack))}/{len(j.found(attack))}" for attack in attacks]
        lines.append(f"| {j.method} | {j.rule} | {' | '.join(counts)} |")
    return "\n".join(lines)


def _costs(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| data | scan | seconds (median) | passes of an image |", "|---|---|---|---|"]
    for data in _names(rows, "data"):
        some = [row for row in rows if row["data"] == data]
        for method in some[0]["scans"]:
            seconds, passes = ([row["scans"][method][key] for row in some] for key in ("seconds", "passes"))
            lines.append(f"| {data} | {method} | {statistics.median(seconds):.1f} | {statistics.median(passes):,.0f} |")
    return "\n".join(lines)


def _draw(judged: dict[str, list[Judged]], path: Path) -> None:
    from matplotlib import pyplot

    shown = {data: [j for j in some if j.clean and j.backdoored] for data, some in judged.items()}
    figure, axes = pyplot.subplots(1, max(1, len(shown)), figsize=(5 * max(1, len(shown)), 4.6), squeeze=False)
    for axis, (data, some) in zip(axes[0], shown.items(), strict=False):
        for j in some:
            false, true, _ = roc_curve(*j.curve())
            style = "-" if j.rule == "conformal" else "--"
            axis.plot(100 * false, 100 * true, style, label=f"{j.method}, {j.rule}")
        axis.plot([0, 100], [0, 100], color="0.8", zorder=0)
        axis.set(title=data, xlabel="clean networks that alarm (%)", ylabel="backdoored networks that alarm (%)")
        axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def null(level: float = 0.05, networks: int = 1000, classes: int = 10) -> str:
    """False alarms of decision rules where all classes are alike, for several distributions of the statistic."""
    random = np.random.default_rng(0)
    shapes = {
        "log-normal, 0.3": np.exp(0.3 * random.standard_normal((networks, classes))),
        "normal, 10 to 1": 10 + random.standard_normal((networks, classes)),
        "gamma, shape 4": random.gamma(4.0, size=(networks, classes)),
        "uniform, 1 to 2": 1 + random.random((networks, classes)),
    }
    rules = {"gamma null (MM-BD)": _gamma_null, "index above 2 (MAD)": _index, "studentised maximum": _ours}
    lines = [f"| statistic | {' | '.join(rules)} |", "|---" * (1 + len(rules)) + "|"]
    for name, values in shapes.items():
        shares = [_share([rule(row, level) for row in values]) for rule in rules.values()]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _gamma_null(row: Any, level: float) -> bool:
    largest, others = row.max(), np.delete(row, row.argmax())
    shape, place, scale = stats.gamma.fit(others)
    return bool(1 - stats.gamma.cdf(largest, shape, place, scale) ** len(row) <= level)


def _index(row: Any, level: float) -> bool:
    deviation = stats.median_abs_deviation(row, scale="normal")
    return bool((row.max() - np.median(row)) / deviation > 2)


def _ours(row: Any, level: float) -> bool:
    return min(StudentisedMaximum()(torch.as_tensor(row).tolist())) <= level
