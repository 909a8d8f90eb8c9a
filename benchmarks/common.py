"""What the benchmarks share: the network, the data, the Trainer, provenance, and a JSON file for each cell."""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torchmetrics
import torchvision

import nba_lightning
from nba_lightning import BackdoorDataModule, Classifier
from nba_lightning.attacks import Attack
from nba_lightning.augmentation import RandomCropFlip
from nba_lightning.data import ImageFolderSource, Source
from nba_lightning.data.dataset import LabeledImages
from nba_lightning.networks import WideResNet

HERE = Path(__file__).parent
CLEAN_FRACTION, BATCH_SIZE, DEFENSE_BATCH_SIZE = 0.05, 128, 50


class Loaded(Source):
    """A source that is read once for all cells."""

    def __init__(self, source: Source) -> None:
        self.sets = source.load()

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        return self.sets


def parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark on an image folder."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--root", default=".data/cifar10", help="image folder with train/<class>/*, test/<class>/*")
    found.add_argument("--source", default="CIFAR-10, JPEG copy", help="its name in the results")
    found.add_argument("--epochs", type=int, default=15, help="epochs of the poisoned training")
    found.add_argument("--precision", default="bf16-mixed")
    found.add_argument("--results", type=Path, default=HERE / "results" / results)
    found.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="where backdoored models are kept")
    found.add_argument("--progress", action="store_true", help="show progress bars")
    return found


def load(args: argparse.Namespace) -> Source:
    return Loaded(ImageFolderSource(args.root))


def network() -> torch.nn.Module:
    return WideResNet(16, 1).to(memory_format=torch.channels_last)


def data(source: Source, attack: Attack | None, **kwargs: Any) -> BackdoorDataModule:
    return BackdoorDataModule(
        source, attack, augment=RandomCropFlip(), clean_fraction=CLEAN_FRACTION, eval_batch_size=500, **kwargs
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
    """ACC, ASR and RA on the test set, as fractions."""
    figures: dict[str, float] = {}
    for part in trainer(args, 1).test(module, datamodule, verbose=False):
        figures |= {name.removeprefix("test/"): round(value, 6) for name, value in part.items()}
    return figures


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, hardware and what was trained on what."""
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, lightning, torchmetrics, nba_lightning)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "network": "WideResNet-16-1",
        "source": args.source,
        "precision": args.precision,
        "versions": {**versions, "python": platform.python_version()},
        "hardware": f"{device}, {platform.machine()}, {torch.get_num_threads()} threads",
    }


def write(path: Path, cell: dict[str, Any]) -> None:
    """Write a cell; a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell, indent=1) + "\n")
    partial.replace(path)
    shown = {name: cell[name] for name in ("acc", "asr", "ra", "der", "seconds") if name in cell}
    print(path.stem, shown, flush=True)
