"""The table of ``settings.py``: what every defence does in every setting, and over each group."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import cells
from reactivation_report import NEVER, awake

METRICS = {"acc": max, "asr": min, "ra": max, "der": max}
GROUPS = {
    "found": "Settings on which the defaults of NBA were found",
    "reported": "Settings that played no part in finding them",
    "clean": "Networks that nobody poisoned: what cleaning them costs",
}
Cell = Mapping[str, Any]
Found = Mapping[str, Mapping[str, Sequence[Cell]]]  # by setting, then by defence
Awake = Mapping[tuple[str, str], Sequence[float]]  # ASR after re-activation, by setting and defence


def by_setting(found: Iterable[Cell]) -> dict[str, dict[str, list[Cell]]]:
    """Cells by setting, then by defence."""
    result: dict[str, dict[str, list[Cell]]] = {}
    for cell in found:
        result.setdefault(cell["setting"], {}).setdefault(cell["defense"], []).append(cell)
    return result


def values(group: Sequence[Cell], name: str, scale: float = 100.0) -> list[float]:
    return [scale * cell[name] for cell in group if name in cell]


def spread(numbers: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.1f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.1f}"


def best_of(defenses: Mapping[str, Sequence[Cell]]) -> dict[str, float]:
    """The best mean of each metric over the defences, as it is printed."""
    means = {m: [round(statistics.mean(v), 1) for d in defenses.values() if (v := values(d, m))] for m in METRICS}
    return {metric: METRICS[metric](found) for metric, found in means.items() if found}


def rows(setting: str, defenses: Mapping[str, Sequence[Cell]], after: Awake) -> list[str]:
    """Undefended, floor and ceiling, then every defence; the best mean of each metric in bold."""
    before: Cell = next(iter(defenses.get("none", ())), {})
    own = {name: group for name, group in sorted(defenses.items()) if name != "none"}
    lines, best = [], best_of(own)
    if "acc" in before:
        for title, row in {"*undefended*": before, "*never poisoned*": before["never_poisoned"]}.items():
            again = spread(after.get((setting, NEVER), ())) if row is not before else ""
            shown = [*(spread(values([row], metric)) for metric in METRICS), again, ""]
            lines.append(f"| {setting} | {title} | 1 | " + " | ".join(shown) + " |")
    for name, group in own.items():
        failed = [cell["error"] for cell in group if "error" in cell]
        note = f" ({len(failed)} failed: {failed[0]})" if failed else ""
        shown = []
        for metric in METRICS:
            numbers = values(group, metric)
            marked = bool(numbers) and round(statistics.mean(numbers), 1) == best[metric]
            shown.append(f"**{spread(numbers)}**" if marked else spread(numbers))
        passes = values(group, "passes_per_image", 1.0)
        cost = f"{statistics.mean(passes):.0f}" if passes else ""
        shown += [spread(after.get((setting, name), ())), cost]
        lines.append(f"| {setting} | {name} | {len(group) - len(failed)}{note} | " + " | ".join(shown) + " |")
    return lines


def aims(before: Cell, group: Sequence[Cell]) -> list[float]:
    """ACC lost, ASR above the floor and RA below the ceiling, in points, then RA and DER; means over the seeds."""
    mean = {metric: statistics.mean(values(group, metric)) for metric in METRICS}
    never = before["never_poisoned"]
    bounds = [100 * before["acc"] - mean["acc"], mean["asr"] - 100 * never["asr"], 100 * never["ra"] - mean["ra"]]
    return [*bounds, mean["ra"], mean["der"]]


def averages(found: Found, after: Awake) -> list[str]:
    """Defences over the settings of a group that all of the shown ones have met, the worst setting in brackets."""
    names = sorted({name for defenses in found.values() for name in defenses} - {"none"})
    known = {setting: defenses for setting, defenses in found.items() if values(defenses.get("none", ()), "acc")}
    met = {name: {s for s, defenses in known.items() if values(defenses.get(name, ()), "der")} for name in names}
    most = max((len(those) for those in met.values()), default=0)
    shown = [name for name in names if most and 2 * len(met[name]) > most]
    shared = sorted(set.intersection(*(met[name] for name in shown))) if shown else []
    if not shared:
        return ["No setting has been met by most defences yet."]
    left = [f"{name} ({len(met[name])} of {most} settings)" for name in names if name not in shown]
    lines = [
        f"Means over {len(shared)} settings ({', '.join(shared)}); the worst one in brackets."
        + (f" Left out, since settings are missing: {', '.join(left)}." if left else ""),
        "",
        "| defence | n | ACC lost | ASR above the floor | RA below the ceiling | RA | DER | re-activated ASR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    table = {n: list(zip(*(aims(found[s]["none"][0], found[s][n]) for s in shared), strict=True)) for n in shown}
    picks = [min, min, min, max, max]
    best = [pick(round(statistics.mean(table[n][i]), 1) for n in shown) for i, pick in enumerate(picks)]
    worst = [max, max, max, min, min]
    for name in shown:
        columns = []
        for index, column in enumerate(table[name]):
            mean = f"{statistics.mean(column):.1f}"
            mean = f"**{mean}**" if round(statistics.mean(column), 1) == best[index] else mean
            columns.append(f"{mean} ({worst[index](column):.1f})")
        woken = [statistics.mean(numbers) for setting in shared if (numbers := after.get((setting, name), ()))]
        columns.append(f"{statistics.mean(woken):.1f} of {len(woken)}" if woken else "")
        seeds = min(len(values(found[setting][name], "der")) for setting in shared)
        lines.append(f"| {name} | {seeds} | " + " | ".join(columns) + " |")
    return lines


def report(results: Path, only: Sequence[str] | None = None, networks: Sequence[str] | None = None) -> str:
    """The whole table, the groups apart.

    Args:
        results: folder of the cells.
        only: defences to show; ``None`` for all.
        networks: classes of networks to show; ``None`` for all.

    The cells of ``reactivation.py`` are looked for beside the folder.
    """
    after = awake(cells(results.parent / "reactivation"))
    chosen = [cell for cell in cells(results) if only is None or cell["defense"] in (*only, "none")]
    if networks is not None:
        of_network = {cell["setting"] for cell in chosen if cell.get("network") in networks}
        chosen = [cell for cell in chosen if cell["setting"] in of_network]
    parts: list[str] = []
    for group, title in GROUPS.items():
        # A failed cell does not say its group, its setting's undefended one does.
        names = {cell["setting"] for cell in chosen if cell.get("group") == group}
        found = by_setting(cell for cell in chosen if cell["setting"] in names)
        if not found:
            continue
        head = "| setting | defence | n | ACC | ASR | RA | DER | re-activated ASR | passes per image |"
        lines = [line for setting, defenses in sorted(found.items()) for line in rows(setting, defenses, after)]
        means = [] if group == "clean" else ["\n".join(averages(found, after))]  # nothing was there to be removed
        parts += [f"**{title}.**", *means, "\n".join([head, "|---" * 9 + "|", *lines])]
    if not parts:
        raise SystemExit(f"No such cell in {results}; run benchmarks/settings.py first.")
    return "\n\n".join(parts)
