"""A Markdown table and a figure of the grid's cells that are there; nothing is run.

    python benchmarks/report.py                       # defences: averages, then every attack
    python benchmarks/report.py --figure grid.png
    python benchmarks/report.py --only nba no_alignment form_fsp
    python benchmarks/report.py --compact             # the table of README.md: attacks as columns
    python benchmarks/report.py --settings            # the cells of settings.py instead, by setting

Figures are means over the seeds, and in the averages over the attacks that most defences have met.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import settings_report
from common import DEFENSES, HERE, cells
from matplotlib.axes import Axes
from matplotlib.figure import Figure

METRICS = ("acc", "asr", "ra", "der")
OTHERS = [f"C{number}" for number in range(10) if number != 3]  # no other red beside ours
COSTS = ("seconds", "passes_per_image", "peak_memory_mib")
Group = Sequence[Mapping[str, Any]]
Found = Mapping[str, Mapping[str, Group]]  # by attack, then by defence
Undefended = Mapping[str, Mapping[str, Any]]  # by attack


def groups(found: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Cells by attack, then by defence."""
    result: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for cell in found:
        result.setdefault(cell["attack"], {}).setdefault(cell["defense"], []).append(cell)
    return result


def values(group: Group, name: str, scale: float = 100.0) -> list[float]:
    return [scale * cell[name] for cell in group if name in cell]


def spread(numbers: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.1f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.1f}"


def bounded(found: Found, before: Undefended) -> list[str]:
    """The attacks whose floor and ceiling are known, by name."""
    return [attack for attack in sorted(found) if "never_poisoned" in before.get(attack, {})]


def defenses_on(found: Found, attacks: Iterable[str]) -> list[str]:
    """The defences that have met any of the attacks, by name."""
    return sorted({defense for attack in attacks for defense in found[attack]})


def table(found: Found, before: Undefended) -> str:
    """One block of rows an attack: undefended, floor and ceiling, then every defence."""
    lines = [
        "| attack | defence | n | ACC | ASR | RA | DER | seconds | passes per image | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for attack, defenses in sorted(found.items()):
        row = before.get(attack, {})
        if "acc" in row:
            shown = [spread(values([row], name)) for name in METRICS]
            lines.append(f"| {attack} | none | 1 | " + " | ".join([*shown, "", "", ""]) + " |")
        if "never_poisoned" in row:
            bound = row["never_poisoned"]
            limits = f"{100 * bound['acc']:.1f} | {100 * bound['asr']:.1f} | {100 * bound['ra']:.1f}"
            lines.append(f"| {attack} | *never poisoned* | 1 | {limits} | | | | |")
        for defense, group in sorted(defenses.items()):
            shown = [spread(values(group, name)) for name in METRICS]
            shown += [f"{statistics.mean(found):.0f}" if (found := values(group, name, 1.0)) else "" for name in COSTS]
            failed = [cell["error"] for cell in group if "error" in cell]
            note = f" ({len(failed)} failed: {failed[0]})" if failed else ""
            lines.append(f"| {attack} | {defense} | {len(group) - len(failed)}{note} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def compact(found: Found, before: Undefended) -> str:
    """An attack a column, ACC, ASR and RA below each other; the best mean of each in bold."""
    attacks = bounded(found, before)
    names = defenses_on(found, attacks)
    shown: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for attack in attacks:
        for metric, best in (("acc", max), ("asr", min), ("ra", max)):
            met = {n: v for n in names if (v := values(found[attack].get(n, []), metric))}
            means = {name: round(statistics.mean(v), 1) for name, v in met.items()}
            for name, v in met.items():
                text = f"**{spread(v)}**" if means[name] == best(means.values()) else spread(v)
                shown[name].setdefault(attack, []).append(text)
    limits = {
        "*undefended*": before,
        "*never poisoned*": {attack: before[attack]["never_poisoned"] for attack in attacks},
    }
    rows = {n: {a: [spread(values([row[a]], m)) for m in METRICS[:3]] for a in attacks} for n, row in limits.items()}
    rows |= shown
    lines = ["| ACC, ASR, RA | " + " | ".join(attacks) + " |", "|---" * (len(attacks) + 1) + "|"]
    for name, columns in rows.items():
        lines.append(f"| {name} | " + " | ".join("<br>".join(columns.get(a, ["not run"])) for a in attacks) + " |")
    return "\n".join(lines)


def averages(found: Found, before: Undefended) -> str:
    """Defences over the attacks that most of them have met; means over attacks of the means over seeds."""
    attacks = bounded(found, before)
    names = defenses_on(found, attacks)
    met = {name: {a for a in attacks if values(found[a].get(name, []), "asr")} for name in names}
    shared = [a for a in attacks if 2 * sum(a in those for those in met.values()) > len(names)]
    absent = [f"{name} ({len(met[name])} of {len(shared)})" for name in names if not met[name].issuperset(shared)]
    names = [name for name in names if met[name].issuperset(shared)]
    if not shared or not names:
        return "No attack has met most of the defences yet."
    left_out = f" Not averaged, since attacks are missing: {', '.join(absent)}." if absent else ""
    lines = [
        f"Means over {len(shared)} attacks ({', '.join(shared)}); the worst attack in brackets.{left_out}",
        "",
        "| defence | n | ACC lost | ASR above the floor | RA below the ceiling | RA | DER | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        rows = []
        for attack in shared:
            mean = {key: statistics.mean(values(found[attack][name], key)) for key in METRICS}
            bound, start = before[attack]["never_poisoned"], before[attack]
            lost = 100 * start["acc"] - mean["acc"]
            rows.append(
                (lost, mean["asr"] - 100 * bound["asr"], 100 * bound["ra"] - mean["ra"], mean["ra"], mean["der"])
            )
        columns = list(zip(*rows, strict=True))
        worst = [max, max, max, min, min]
        shown = [f"{statistics.mean(c):.1f} ({pick(c):.1f})" for c, pick in zip(columns, worst, strict=True)]
        seconds = statistics.mean(s for a in shared for s in values(found[a][name], "seconds", 1.0))
        seeds = min(len(values(found[a][name], "asr")) for a in shared)
        lines.append(f"| {name} | {seeds} | " + " | ".join(shown) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def figure(found: Found, before: Undefended, path: Path) -> None:
    """ACC against ASR (above) and against RA (below), an attack a column; bars are one standard deviation."""
    attacks = bounded(found, before)
    names = defenses_on(found, attacks)
    drawing = Figure(figsize=(2.6 * len(attacks) + 1.5, 6.2), layout="constrained")
    grid = drawing.subplots(2, len(attacks), squeeze=False, sharex="col", sharey="row")
    for column, attack in enumerate(attacks):
        for row, metric in enumerate(("asr", "ra")):
            axes: Axes = grid[row, column]
            for index, name in enumerate(names):
                _point(axes, found[attack].get(name, []), metric, name, index)
            bound = 100 * before[attack]["never_poisoned"][metric]
            axes.axhline(bound, color="#555555", lw=1, ls=":", label="floor / ceiling: never poisoned")
            axes.axvline(100 * before[attack]["acc"], color="#bbbbbb", lw=1, label="ACC before the defence")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(-4, 104)
            if column == 0:
                axes.set_ylabel("ASR in %, low is good" if metric == "asr" else "RA in %, high is good")
        grid[0, column].set_title(attack)
        grid[1, column].set_xlabel("ACC in %")
    shown = [axes.get_legend_handles_labels() for axes in grid.flat]
    handles = {label: handle for lines, names in shown for handle, label in zip(lines, names, strict=True)}
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    drawing.savefig(path, dpi=130, facecolor="white", bbox_inches="tight")


def _point(axes: Axes, group: Group, metric: str, name: str, index: int) -> None:
    across, up = values(group, "acc"), values(group, metric)
    if not up:
        return
    bars = [statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for numbers in (across, up)]
    ours = name == "nba"
    axes.errorbar(
        statistics.mean(across),
        statistics.mean(up),
        xerr=bars[0],
        yerr=bars[1],
        fmt="*" if ours else "osD^vP<>X"[index % 9],
        ms=13 if ours else 6,
        color="#c8442f" if ours else OTHERS[index % len(OTHERS)],
        lw=1,
        zorder=3 if ours else 2,
        label=name,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, help="folder of the cells; by default in benchmarks/results")
    options.add_argument("--settings", action="store_true", help="the cells of settings.py, by setting")
    options.add_argument("--network", nargs="+", help="with --settings: these classes of networks, as PreActResNet18")
    options.add_argument("--attack-results", type=Path, default=HERE / "results" / "attacks")
    options.add_argument("--only", nargs="+", help="these defences; by default those of configs/defense")
    options.add_argument("--compact", action="store_true", help="one small table instead, attacks as columns")
    options.add_argument("--figure", type=Path, help="draw it into this file")
    args = options.parse_args()
    args.results = args.results or HERE / "results" / ("settings" if args.settings else "defenses")
    if args.settings:
        print(settings_report.report(args.results, args.only, args.network))
        return
    wanted = args.only or DEFENSES
    found = groups(cell for cell in cells(args.results) if cell["defense"] in wanted)
    if not found:
        raise SystemExit(f"No such cell in {args.results}; run benchmarks/grid.py first.")
    paths = {attack: args.attack_results / f"{attack}-none-0.json" for attack in found}
    before = {attack: json.loads(path.read_text()) for attack, path in paths.items() if path.exists()}
    parts = [compact(found, before)] if args.compact else [averages(found, before), table(found, before)]
    print(*parts, sep="\n\n")
    if args.figure:
        figure(found, before, args.figure)


if __name__ == "__main__":
    main()
