"""Defences on networks, data and ways of implanting that differ: one YAML of ``benchmarks/settings`` each.

    python benchmarks/settings.py --root-cifar .data/cifar10 --root-photos .data/trashnet
                                  --root-fashion /usr/share/datasets/fashion-mnist --strangers .data/strangers
    python benchmarks/settings.py --only fashion_cnn digits --root-fashion ... --defenses fine_tuning nba --seeds 0
    python benchmarks/settings.py --rates sweep --only ...     # every defence at the strongest rate that it can afford
    python benchmarks/settings.py --ablations without_patch ...    # changes of NBA, files of benchmarks/ablations
    python benchmarks/report.py --settings                     # the table of what is there

Settings of the group ``found`` are those on which our own defaults were found; those of ``reported`` are not; those of
``clean`` tell what cleaning a network costs that nobody poisoned (its suspicious model trains for 0 epochs). A setting
names its network, images, attack and way of implanting; suspicious model, clean model (trained alike, never poisoned:
floor and ceiling) and every fit are kept under ``--work`` and are made once. ``--models DIR`` gives models that are
there already, ``NAME.safetensors`` and ``NAME.attack.safetensors``. A cell that is there is not run again, failures
are; one that was killed goes on.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from chain import clean
from common import (
    ABLATIONS,
    DEFENSES,
    HERE,
    Loaded,
    build,
    config,
    done,
    merged,
    plain_parser,
    provenance,
    quiet,
    run_cells,
    test,
)
from implanting import SETTINGS, Models, attack_of, images, models, read_setting
from keeping import Subject, settings_of
from torch import nn

from nba_lightning import Classifier
from nba_lightning.core.checks import first_few
from nba_lightning.core.functional import defense_effectiveness_rating
from nba_lightning.data import Source
from nba_lightning.io.weights import load_weights, save_weights

SWEEP = "@sweep"


class Cell(NamedTuple):
    """A defence in a setting; its name has ``@sweep`` behind it where its rate was swept."""

    setting: str
    defense: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.defense}-{self.seed}"


def undefended(args: argparse.Namespace, source: Source, cell: Cell) -> dict[str, Any]:
    """The suspicious model as it is, and the one that was never poisoned."""
    setting, found = args.setting, models(args, args.setting, source)
    args.work.joinpath("models", f"{cell.setting}.json").write_text(json.dumps([str(file or "") for file in found]))
    attack = attack_of(setting, **({} if found.attack is None else {"state": str(found.attack)}))
    datamodule = images(setting, source, attack)
    before, never = (test(args, Classifier(loaded(setting, file)), datamodule) for file in (found[1], found[0]))
    result = {**described(args, cell), **before, "clean_acc": never["acc"], "never_poisoned": never}
    return result | {"poison_rate": attack.poison_rate, **provenance(args)}


def defend(args: argparse.Namespace, source: Source, cell: Cell) -> dict[str, Any]:
    """Clean the suspicious model of a setting and test it."""
    before = json.loads((args.results / f"{cell.setting}-none-0.json").read_text())
    setting, found = args.setting, found_models(args, cell.setting)
    pl.seed_everything(cell.seed, verbose=False)
    sweep = cell.defense.endswith(SWEEP)
    chosen = defense_config(args, source, cell)
    attack = attack_of(setting, **({} if found.attack is None else {"state": str(found.attack)}))
    datamodule = images(setting, source, attack, train_on="clean", order_seed=cell.seed, batch_size=2)
    datamodule.setup()
    subject = Subject(cell.name, setting["network"], found.poisoned, datamodule, cell.seed)
    network, cost = clean(args, chosen, subject, sweep)
    figures = test(args, Classifier(network), datamodule)
    rating = defense_effectiveness_rating(before["acc"], before["asr"], figures["acc"], figures["asr"])
    result = {**described(args, cell), **figures, "der": round(rating, 6), "seconds": cost.seconds}
    result |= {"passes_per_image": round(cost.passes / subject.images, 2), "peak_memory_mib": cost.peak_memory_mib}
    result |= {"clean_fraction": datamodule.clean_fraction, "clean_images": subject.images}
    result |= {"poison_rate": before["poison_rate"]} | ({"sweeps": cost.sweeps} if sweep else {})
    result |= {"settings": settings_of(chosen, subject.images, subject.network, sweep), **provenance(args)}
    save_weights(network.state_dict(), args.work / "cleaned" / f"{cell.name}.safetensors")
    return result


def defense_config(args: argparse.Namespace, source: Source, cell: Cell) -> Any:
    """Its YAML, on the images that the setting gives the defender."""
    subset = {"clean_fraction": args.setting["clean_images"] / len(source.load()[0]), "order_seed": cell.seed}
    subset |= {"validation_fraction": args.setting["validation_fraction"]}
    own = {"data": {"init_args": subset}}
    label = cell.defense.removesuffix(SWEEP)
    if label in DEFENSES:
        return merged(config("defense", label), own)
    change = yaml.safe_load((HERE / "ablations" / f"{label}.yaml").read_text())
    return merged(merged(config("defense", "nba"), change), own)


def stale(args: argparse.Namespace, source: Source, cell: Cell) -> bool:
    """Whether its result is there, with other settings than these."""
    path = args.results / f"{cell.name}.json"
    if not done(path):
        return False
    before = json.loads(path.read_text())
    found, sweep = defense_config(args, source, cell), cell.defense.endswith(SWEEP)
    today = settings_of(found, before["clean_images"], args.setting["network"], sweep)
    return bool(before["settings"] != today)


def described(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """What a result says it is."""
    attack = {"attack": args.setting["attack"]["config"], "defense": cell.defense, "seed": cell.seed}
    return {"setting": cell.setting, "group": args.setting["group"], **attack}


def loaded(setting: Any, weights: Path) -> nn.Module:
    network: nn.Module = build(nn.Module, setting["network"]).to(memory_format=torch.channels_last)
    load_weights(network, weights)
    return network


def found_models(args: argparse.Namespace, name: str) -> Models:
    """The files that :func:`undefended` used."""
    clean_file, poisoned, attack = json.loads((args.work / "models" / f"{name}.json").read_text())
    return Models(Path(clean_file), Path(poisoned), Path(attack) if attack else None)


@functools.cache
def source_of(spec: str) -> Source:
    """The images of a source, read once for all settings that name it; ``spec`` is JSON, which can be a key."""
    return Loaded(build(Source, json.loads(spec)))


def within(args: argparse.Namespace, setting: Any) -> argparse.Namespace:
    """The arguments for the cells of one setting."""
    network = setting["network"]["class_path"].rpartition(".")[2]
    return argparse.Namespace(**vars(args) | {"setting": setting, "network": network, "source": setting["about"]})


def each(args: argparse.Namespace, run: Callable[[argparse.Namespace, str], int], what: str) -> NoReturn:
    """Run all settings of the command line, one that cannot be run or not, and end with what failed."""
    failed = 0
    for name in args.only:
        try:
            failed += run(args, name)
        except (ValueError, OSError) as error:
            print(f"{name}: {error}", flush=True)
            failed += 1
    raise SystemExit(f"{failed} {what} or settings failed; see above and their JSON." if failed else 0)


def run(args: argparse.Namespace, name: str) -> int:
    """All cells of one setting; how many failed."""
    setting = read_setting(args, name)
    name = setting["name"]
    here = within(args, setting)
    suffix = SWEEP if args.rates == "sweep" else ""
    cells = [Cell(name, defense + suffix, seed) for seed in args.seeds for defense in [*args.defenses, *args.ablations]]
    source = source_of(json.dumps(setting["source"]))
    if changed := [cell.name for cell in cells if stale(here, source, cell)]:
        raise ValueError(f"Run with other settings than today's, so delete or rename them: {first_few(changed)}.")
    own, at = Cell(name, "none", 0), args.work / "models" / f"{name}.json"
    at.parent.mkdir(parents=True, exist_ok=True)
    if run_cells(here, source, undefended, [(own.name, own)], again=[] if at.exists() else [own.name]):
        return 1
    return run_cells(here, source, defend, [(cell.name, cell) for cell in cells])


def main() -> None:
    quiet()
    options = plain_parser(__doc__, "settings")
    options.add_argument("--root-cifar", type=Path, help="CIFAR-10 as image folder, train/<class>/* and test/<class>/*")
    options.add_argument("--root-photos", type=Path, help="TrashNet likewise")
    options.add_argument("--root-fashion", type=Path, help="folder of Fashion-MNIST's four *-ubyte.gz files")
    options.add_argument("--strangers", type=Path, help="folder of published state dicts")
    options.add_argument("--models", type=Path, help="folder of models that are trained already")
    options.add_argument("--only", nargs="+", default=SETTINGS, help="these settings, by name or as a file of your own")
    options.add_argument("--defenses", nargs="*", choices=DEFENSES, default=DEFENSES)
    options.add_argument("--ablations", nargs="*", choices=ABLATIONS, default=[], help="changes of NBA")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--rates", choices=("authors", "sweep"), default="authors", help="whose learning rates")
    each(options.parse_args(), run, "cells")


if __name__ == "__main__":
    main()
