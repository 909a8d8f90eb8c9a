"""Attacks x defences x seeds on an image folder: one JSON file a cell, resuming where it was stopped.

    python benchmarks/grid.py --root .data/cifar10 --attacks badnets blended

Every model is tested once, after its last epoch. The backdoored model of an attack is trained once (see attacks.py) and
kept under ``--work``; the seeds are those of the defences: of their own draws, and of the order and augmentation of the
defender's images, which are the same for all.
"""

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from attacks import ATTACKS, attack_for, fit, implant
from common import CLEAN_FRACTION, DEFENSE_BATCH_SIZE, data, load, parser, provenance, test, write

from nba_lightning import ANP, FTSAM, IBAU, NAD, NBA, SAU, Classifier, FinePruning, FineTuning
from nba_lightning.data import Source
from nba_lightning.functional import defense_effectiveness_rating

DEFENSES: dict[str, Callable[..., Classifier]] = {
    "fine_tuning": FineTuning,
    "fine_pruning": FinePruning,
    "nad": NAD,
    "anp": ANP,
    "i_bau": IBAU,
    "ft_sam": FTSAM,
    "sau": SAU,
    "nba": NBA,
}
EPOCHS = {
    "fine_tuning": 10,
    "fine_pruning": 100,
    "nad": 20,
    "anp": 118,
    "i_bau": 5,
    "ft_sam": 100,
    "sau": 100,
    "nba": 30,
}
BATCH_SIZES = {"fine_pruning": 256, "nad": 64, "anp": 128, "i_bau": 256, "ft_sam": 256, "sau": 256}


def defend(args: argparse.Namespace, source: Source, name: str, defense: str, seed: int) -> None:
    """One cell."""
    label = args.label or defense
    path = args.results / f"{name}-{label}-{seed}.json"
    if path.exists():
        return
    model, before = implant(args, source, name)
    pl.seed_everything(seed, verbose=False)
    datamodule = data(
        source,
        attack_for(args, name),
        train_on="clean",
        batch_size=BATCH_SIZES.get(defense, DEFENSE_BATCH_SIZE),
        order_seed=seed,
    )
    settings = dict(args.set)
    epochs = int(settings.pop("epochs", EPOCHS[defense]))
    module = DEFENSES[defense](copy.deepcopy(model), seed=seed, **settings)
    seconds = fit(args, module, datamodule, epochs)
    cell = {"attack": name, "defense": label, "seed": seed, **test(args, module, datamodule)}
    cell["der"] = round(defense_effectiveness_rating(before["acc"], before["asr"], cell["acc"], cell["asr"]), 6)
    cell |= {"seconds": seconds, "clean_fraction": CLEAN_FRACTION, "poison_rate": before["poison_rate"]}
    cell |= {"settings": {"epochs": epochs, "batch_size": datamodule.batch_size} | dict(args.set), **provenance(args)}
    write(path, cell)


def table(results: Path) -> str:
    """Mean and sample standard deviation over the seeds of what is there, as Markdown; percent."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        cell = json.loads(path.read_text())
        cells.setdefault((cell["attack"], cell["defense"]), []).append(cell)
    lines = ["| attack | defence | n | ACC | ASR | RA | DER | seconds |", "|---|---|---|---|---|---|---|---|"]
    for (attack, defense), group in sorted(cells.items(), key=lambda item: (item[0][0], item[0][1] != "none")):
        if "asr" not in group[0]:
            continue
        shown = [_spread([100 * cell[name] for cell in group if name in cell]) for name in ("acc", "asr", "ra", "der")]
        seconds = f"{statistics.mean(cell['seconds'] for cell in group):.0f}"
        lines.append(f"| {attack} | {defense} | {len(group)} | " + " | ".join([*shown, seconds]) + " |")
        bound = group[0].get("never_poisoned")
        if bound:
            floor, ceiling = f"{100 * bound['asr']:.1f}", f"{100 * bound['ra']:.1f}"
            lines.append(f"| {attack} | *never poisoned* | 1 | {100 * bound['acc']:.1f} | {floor} | {ceiling} | | |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{values[0]:.1f}" if len(values) == 1 else f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def setting(text: str) -> tuple[str, Any]:
    """``NAME=JSON`` of the command line."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    warnings.filterwarnings("ignore")
    options = parser(__doc__, "defenses")
    options.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    options.add_argument("--defenses", nargs="*", default=list(DEFENSES), choices=DEFENSES)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--set", nargs="*", type=setting, default=[], help="NAME=JSON arguments of the defence")
    options.add_argument("--label", help="name of the defence in the results, for such variants")
    options.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    args = options.parse_args()
    args.poison_rate = None
    if args.table:
        print(table(args.results))
        return
    source = load(args)
    for name in args.attacks:
        implant(args, source, name)
        for seed in args.seeds:
            for defense in args.defenses:
                defend(args, source, name, defense, seed)


if __name__ == "__main__":
    main()
