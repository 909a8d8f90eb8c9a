"""Attacks x defences x seeds: one JSON file a cell, resuming where it was stopped.

    python benchmarks/grid.py --root .data/cifar10 --jobs 2
    python benchmarks/grid.py --root .data/cifar10 --attacks badnets sig --defenses nba sau --seeds 0
    python benchmarks/grid.py --root .data/cifar10 --ablations all --attacks badnets blended sig
    python benchmarks/grid.py --root .data/cifar10 --defenses nba nad --clean-fraction 0.01
    python benchmarks/report.py                                # table and figure of what is there

Defences are those of ``configs/defense``, as they stand there; ablations are files of ``benchmarks/ablations``, laid
over ``configs/defense/nba.yaml``. The attack ``clean`` is none: every defence on a model that nobody poisoned. Every
model is tested once, after its last epoch. A defence that needs a teacher gets one by fine-tuning, in a fit of its own
whose cost counts; defences of one seed share it. The backdoored model of an attack is trained once (see attacks.py) and
kept under ``--work``, teachers and cleaned ones beside it; the seeds are those of the defences: of their own draws, and
of the order and augmentation of the defender's images, which are the same for all. A cell that is there is not run
again, and one that was killed goes on from where it was last saved; if one was run with other settings than today's,
nothing runs until it is deleted or renamed.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import yaml
from attacks import Row, attack_for, implant_all, state_file
from chain import clean
from common import (
    ABLATIONS,
    ATTACKS,
    DEFENSES,
    HERE,
    config,
    data,
    done,
    load,
    merged,
    network_spec,
    parser,
    provenance,
    quiet,
    run_cells,
    test,
)
from keeping import Subject, settings_of

from nba_lightning import Classifier
from nba_lightning.core.checks import first_few
from nba_lightning.core.functional import defense_effectiveness_rating
from nba_lightning.data import Source
from nba_lightning.io.weights import save_weights

CLEAN_FRACTION = 0.05


class Cell(NamedTuple):
    """A defence of a suspicious model."""

    attack: str
    defense: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.attack}-{self.defense}-{self.seed}"


def defense_config(args: argparse.Namespace, cell: Cell) -> Any:
    """Its YAML, with the arguments of the command line on top. ``$WORK`` and the like in it stand as they are."""
    label = args.defenses[0] if args.label else cell.defense.split("@")[0]
    if label in DEFENSES:
        found = config("defense", label)
    else:
        change = yaml.safe_load((HERE / "ablations" / f"{label}.yaml").read_text())
        found = merged(config("defense", "nba"), change)
    settings = dict(args.set)
    epochs = settings.pop("epochs", found["trainer"]["max_epochs"])
    subset = {"clean_fraction": args.clean_fraction, "order_seed": cell.seed}
    parts = {"model": {"init_args": settings}, "data": {"init_args": subset}, "trainer": {"max_epochs": epochs}}
    return merged(found, parts)


def filled(args: argparse.Namespace, cell: Cell, found: Any) -> Any:
    """The configuration in which ``$WORK``, ``$ATTACK`` and ``$SEED`` have their values."""
    text = json.dumps(found)
    for name, value in {"WORK": args.work, "ATTACK": cell.attack, "SEED": cell.seed}.items():
        text = text.replace(f"${name}", str(value))
    return json.loads(text)


def stale(args: argparse.Namespace, cell: Cell) -> bool:
    """Whether its result is there, with other settings than these."""
    path = args.results / f"{cell.name}.json"
    if not done(path):
        return False
    before = json.loads(path.read_text())
    today = settings_of(defense_config(args, cell), before["clean_images"], network_spec(args))
    return bool(before["settings"] != today)


def defend(args: argparse.Namespace, source: Source, cell: Cell) -> dict[str, Any]:
    """Clean one model and test it."""
    before = json.loads((args.attack_results / f"{cell.attack}-none-0.json").read_text())
    pl.seed_everything(cell.seed, verbose=False)
    found = defense_config(args, cell)
    attack = None if cell.attack == "clean" else attack_for(args, cell.attack, state=state_file(args, cell.attack))
    datamodule = data(args, source, attack, **found["data"]["init_args"] | {"batch_size": 2})
    datamodule.setup()
    weights = args.work / f"{cell.attack}.safetensors"
    subject = Subject(cell.name, network_spec(args), weights, datamodule, cell.seed)
    network, cost = clean(args, filled(args, cell, found), subject)
    figures = test(args, Classifier(network), datamodule)
    result = {"attack": cell.attack, "defense": cell.defense, "seed": cell.seed, **figures}
    if "asr" in result:
        rating = defense_effectiveness_rating(before["acc"], before["asr"], result["acc"], result["asr"])
        result["der"] = round(rating, 6)
    result |= {"seconds": cost.seconds, "passes_per_image": round(cost.passes / subject.images, 2)}
    result |= {"peak_memory_mib": cost.peak_memory_mib, "clean_fraction": args.clean_fraction}
    result |= {"clean_images": subject.images, "poison_rate": before.get("poison_rate", 0.0)}
    result |= {"settings": settings_of(found, subject.images, subject.network), **provenance(args)}
    save_weights(network.state_dict(), args.work / f"{cell.name}.safetensors")
    return result


def setting(text: str) -> tuple[str, Any]:
    """``NAME=JSON`` of the command line."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def labels(args: argparse.Namespace) -> list[str]:
    """Names of the defences that were asked for, in the results."""
    ablations = ABLATIONS if args.ablations == ["all"] else args.ablations
    chosen = [args.label] if args.label else [*args.defenses, *ablations] or DEFENSES
    if args.clean_fraction != CLEAN_FRACTION:
        chosen = [f"{label}@{100 * args.clean_fraction:g}%" for label in chosen]
    return chosen


def main() -> None:
    quiet()
    options = parser(__doc__, "defenses")
    options.add_argument("--attacks", nargs="+", default=ATTACKS, choices=[*ATTACKS, "clean"])
    options.add_argument("--defenses", nargs="*", choices=DEFENSES, default=[], help="all, if no ablation is named")
    options.add_argument("--ablations", nargs="*", choices=[*ABLATIONS, "all"], default=[])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--clean-fraction", type=float, default=CLEAN_FRACTION, help="the defender's images")
    options.add_argument("--set", nargs="*", type=setting, default=[], help="NAME=JSON arguments of the defence")
    options.add_argument("--label", help="name in the results of the one defence that `--set` changes")
    options.add_argument("--attack-results", type=Path, default=HERE / "results" / "attacks")
    args = options.parse_args()
    if (args.set or args.label) and (not args.label or len(args.defenses) != 1 or args.ablations):
        options.error("--set changes one defence: name it by --defenses, and the result by --label")
    tasks = [Cell(attack, label, seed) for seed in args.seeds for label in labels(args) for attack in args.attacks]
    if changed := [task.name for task in tasks if stale(args, task)]:
        raise SystemExit(f"Run with other settings than today's, so delete or rename them: {first_few(changed)}.")
    source = load(args)
    implanting = argparse.Namespace(**vars(args) | {"results": args.attack_results})
    if implant_all(implanting, source, [Row(name) for name in args.attacks if name != "clean"]):
        raise SystemExit("An attack could not be implanted; its JSON says why.")
    failed = run_cells(args, source, defend, [(task.name, task) for task in tasks])
    raise SystemExit(f"{failed} cells failed; their JSON says why." if failed else 0)


if __name__ == "__main__":
    main()
