"""Attacks x defences x seeds on an image folder: one JSON file a cell, resuming where it was stopped.

    python benchmarks/grid.py --root .data/cifar10

Every model is tested once, after its last epoch. The backdoored model of an attack is trained once (seed 0) and kept
under ``--work``; the seeds are those of the defences: of their own draws, and of the order and augmentation of the
defender's images, which are the same for all.
"""

import argparse
import copy
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torchmetrics
import torchvision

import nba_lightning
from nba_lightning import NBA, BackdoorDataModule, Classifier, FineTuning
from nba_lightning.attacks import Attack, BadNets, Blended
from nba_lightning.augmentation import RandomCropFlip
from nba_lightning.data import ImageFolderSource, Source
from nba_lightning.data.dataset import LabeledImages
from nba_lightning.functional import defense_effectiveness_rating
from nba_lightning.networks import WideResNet
from nba_lightning.weights import load_weights, save_weights

ATTACKS: dict[str, Callable[[], Attack]] = {"badnets": BadNets, "blended": Blended}
DEFENSES: dict[str, Callable[..., Classifier]] = {"fine_tuning": FineTuning, "nba": NBA}
EPOCHS = {"fine_tuning": 10, "nba": 30}
CLEAN_FRACTION, BATCH_SIZE, DEFENSE_BATCH_SIZE = 0.05, 128, 50


class Loaded(Source):
    """A source that is read once for all cells."""

    def __init__(self, source: Source) -> None:
        self.sets = source.load()

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        return self.sets


def provenance() -> dict[str, Any]:
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, lightning, torchmetrics, nba_lightning)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "versions": {**versions, "python": platform.python_version()},
        "hardware": f"{device}, {platform.machine()}, {torch.get_num_threads()} threads",
    }


def network() -> torch.nn.Module:
    return WideResNet(16, 1).to(memory_format=torch.channels_last)


def data(source: Source, attack: Attack, seed: int, **kwargs: Any) -> BackdoorDataModule:
    return BackdoorDataModule(
        source,
        attack,
        augment=RandomCropFlip(),
        clean_fraction=CLEAN_FRACTION,
        eval_batch_size=500,
        seed=seed,
        **kwargs,
    )


def trainer(args: argparse.Namespace, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_model_summary=False,
        enable_progress_bar=args.progress,
        default_root_dir=args.work,
    )


def test(args: argparse.Namespace, module: Classifier, datamodule: BackdoorDataModule) -> dict[str, float]:
    figures: dict[str, float] = {}
    for part in trainer(args, 1).test(module, datamodule, verbose=False):
        figures |= {name.removeprefix("test/"): round(value, 6) for name, value in part.items()}
    return figures


def write(path: Path, cell: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell, indent=1) + "\n")
    partial.replace(path)
    print(path.stem, {name: cell.get(name) for name in ("acc", "asr", "ra", "der", "seconds")}, flush=True)


def backdoored(args: argparse.Namespace, source: Source, name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    weights, record = args.work / f"{name}.safetensors", args.results / f"{name}-none-0.json"
    model = network()
    if weights.exists() and record.exists():
        load_weights(model, weights)
        return model, json.loads(record.read_text())
    pl.seed_everything(0, verbose=False)
    model = network()
    module, datamodule = Classifier(model), data(source, ATTACKS[name](), 0, batch_size=BATCH_SIZE)
    start = time.perf_counter()
    trainer(args, args.epochs).fit(module, datamodule)
    seconds = time.perf_counter() - start
    save_weights(model.state_dict(), weights)
    cell = base(args, name, "none", 0) | test(args, module, datamodule)
    cell |= {
        "seconds": round(seconds, 1),
        "settings": {"epochs": args.epochs, "batch_size": BATCH_SIZE, "lr": module.lr},
    }
    for other in ATTACKS:
        if other != name:
            datamodule = data(source, ATTACKS[other](), 0, train_on="clean")
            cell.setdefault("never_poisoned_with", {})[other] = test(args, module, datamodule)
    write(record, cell)
    return model, cell


def base(args: argparse.Namespace, attack: str, defense: str, seed: int) -> dict[str, Any]:
    return {
        "attack": attack,
        "defense": defense,
        "seed": seed,
        "network": "WideResNet-16-1",
        "source": args.source,
        "clean_fraction": CLEAN_FRACTION,
        "poison_rate": ATTACKS[attack]().poison_rate,
        "precision": args.precision,
        **provenance(),
    }


def defend(args: argparse.Namespace, source: Source, name: str, defense: str, seed: int) -> None:
    path = args.results / f"{name}-{args.label or defense}-{seed}.json"
    if path.exists():
        return
    model, before = backdoored(args, source, name)
    pl.seed_everything(seed, verbose=False)
    datamodule = data(source, ATTACKS[name](), 0, train_on="clean", batch_size=DEFENSE_BATCH_SIZE, order_seed=seed)
    settings = dict(args.set)
    epochs = int(settings.pop("epochs", EPOCHS[defense]))
    module = DEFENSES[defense](copy.deepcopy(model), seed=seed, **settings)
    start = time.perf_counter()
    trainer(args, epochs).fit(module, datamodule)
    seconds = time.perf_counter() - start
    cell = base(args, name, args.label or defense, seed) | test(args, module, datamodule)
    cell["der"] = round(defense_effectiveness_rating(before["acc"], before["asr"], cell["acc"], cell["asr"]), 6)
    cell |= {
        "seconds": round(seconds, 1),
        "settings": {"epochs": epochs, "batch_size": DEFENSE_BATCH_SIZE} | dict(args.set),
    }
    write(path, cell)


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="image folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--source", default="CIFAR-10, JPEG copy", help="its name in the results")
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--defenses", nargs="*", default=list(DEFENSES), choices=DEFENSES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15, help="epochs of the poisoned training")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--set", nargs="*", type=setting, default=[], help="NAME=JSON arguments of the defence")
    parser.add_argument("--label", help="name of the defence in the results, for such variants")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="where backdoored models are kept")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    args = parser.parse_args()
    source = Loaded(ImageFolderSource(args.root))
    for name in args.attacks:
        backdoored(args, source, name)
        for seed in args.seeds:
            for defense in args.defenses:
                defend(args, source, name, defense, seed)


if __name__ == "__main__":
    main()
