"""What the benchmarks share: parts built from ``configs/``, the Trainer, cells run side by side, provenance, JSON."""

import argparse
import copy
import json
import logging
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.multiprocessing
import torchmetrics
import torchvision
import yaml
from jsonargparse import ArgumentParser
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import nba_lightning
from nba_lightning import BackdoorDataModule, Classifier
from nba_lightning.attacks import Attack
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.data import Source
from nba_lightning.data.dataset import LabeledImages, MemoryImages

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
ELSEWHERE = ("none", "scar")  # no attack; one that starts from a clean model, as settings do
ATTACKS = sorted(path.stem for path in (CONFIGS / "attack").glob("*.yaml") if path.stem not in ELSEWHERE)
DEFENSES = sorted(path.stem for path in (CONFIGS / "defense").glob("*.yaml") if path.stem != "none")
ABLATIONS = sorted(path.stem for path in (HERE / "ablations").glob("*.yaml"))
BATCH_SIZE, SHAPE = 128, (3, 32, 32)


class Loaded(Source):
    """A source that is read once for all cells; its tensors are shared between processes."""

    def __init__(self, source: Source) -> None:
        self.sets = source.load()
        self.classes = source.check(*self.sets)

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        return self.sets


class Noise(Source):
    """Random images of CIFAR-10's shape, in ten classes."""

    def __init__(self, number: int) -> None:
        pixels = torch.randint(0, 256, (number, *SHAPE), dtype=torch.uint8)
        self.images = MemoryImages(pixels, torch.arange(number) % 10)

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        return self.images, self.images


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation."""
    return {"mean": round(statistics.mean(values), 3), "std": round(statistics.stdev(values), 3), "n": len(values)}


def parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark that trains on one source and network."""
    found = plain_parser(description, results)
    found.add_argument("--data", default="image_folder", help="source and augmentation: a file of configs/data")
    found.add_argument("--root", help="folder of the source, other than the config's")
    found.add_argument("--source", default="CIFAR-10, JPEG copy", help="the source's name in the results")
    found.add_argument("--network", default="wide_resnet16_1", help="a file of configs/network")
    found.add_argument("--epochs", type=int, default=15, help="epochs of the poisoned training")
    return found


def plain_parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark that trains."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--precision", default="bf16-mixed")
    found.add_argument("--results", type=Path, default=HERE / "results" / results)
    found.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="where models are kept")
    found.add_argument("--save-every", type=float, default=60, help="seconds after which a fit is saved, to go on from")
    found.add_argument("--jobs", type=int, default=1, help="cells that run at the same time, each in its own process")
    return found


def config(kind: str, name: str) -> Any:
    """A file of ``configs/``, as nested dictionaries."""
    return yaml.safe_load((CONFIGS / kind / f"{name}.yaml").read_text())


def poisoned_training(attack: str | None, implant: str | None = None) -> tuple[Any, str, int]:
    """The module that trains with an attack, on which images, and the epochs that it takes beside the classifier's.

    Args:
        attack: a file of ``configs/attack``; ``None`` for a model that nobody poisons.
        implant: a file of ``configs/implant`` for attacks that have none of their own; ``None`` for plain training.
    """
    own_way = attack is not None and (CONFIGS / "implant" / f"{attack}.yaml").exists()
    if own_way and implant not in (None, attack):
        raise ValueError(f"Expected no `implant` for {attack}, which is implanted in its own way, but got {implant!r}.")
    chosen = attack if own_way else implant
    if attack is None or chosen is None:
        return config("defense", "none")["model"], "poisoned", 0
    found = config("implant", chosen)
    own = found["model"]["init_args"].get("mask_epochs", 0)
    return found["model"], found["data"]["init_args"]["train_on"], own


def merged(base: Any, change: Any) -> Any:
    """``base`` with the values of ``change``, which win; as Lightning's command line composes its files."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    return {key: merged(base.get(key), change[key]) if key in change else base[key] for key in {**base, **change}}


def build(base: type, spec: Any) -> Any:
    """An instance from ``class_path`` and ``init_args``, which stay as they are."""
    instances = ArgumentParser(exit_on_error=False)
    instances.add_argument("--part", type=base)
    own = copy.deepcopy(spec)  # the parser changes what lists hold
    return instances.instantiate_classes(instances.parse_object({"part": own})).part


def network_spec(args: argparse.Namespace) -> Any:
    return config("network", args.network)["model"]["init_args"]["model"]


def network(args: argparse.Namespace) -> nn.Module:
    model: nn.Module = build(nn.Module, network_spec(args)).to(memory_format=torch.channels_last)
    return model


def load(args: argparse.Namespace) -> Source:
    spec = config("data", args.data)["data"]["init_args"]["source"]
    if args.root is not None:
        spec = merged(spec, {"init_args": {"root": args.root}})
    return Loaded(build(Source, spec))


def data(args: argparse.Namespace, source: Source, attack: Attack | None, **kwargs: Any) -> BackdoorDataModule:
    augment = build(RandomCropFlip, config("data", args.data)["data"]["init_args"]["augment"])
    return BackdoorDataModule(source, attack, **{"augment": augment, **kwargs})


def trainer(args: argparse.Namespace, epochs: int, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "devices": 1,
        "precision": args.precision,
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "default_root_dir": args.work,
    }
    return pl.Trainer(**(settings | kwargs))


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
        "network": args.network,
        "source": args.source,
        "precision": args.precision,
        "versions": {**versions, "python": platform.python_version()},
        "hardware": f"{device}, {platform.machine()}, {torch.get_num_threads()} threads, {args.jobs} at a time",
    }


def write(path: Path, cell: dict[str, Any]) -> None:
    """Write a cell; a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell, indent=1) + "\n")
    partial.replace(path)


def done(path: Path) -> bool:
    """Whether a cell is there and did not fail."""
    return path.exists() and "error" not in json.loads(path.read_text())


def cells(folder: Path) -> Iterator[dict[str, Any]]:
    """All cells of a folder, by name."""
    for path in sorted(folder.glob("*.json")):
        yield json.loads(path.read_text())


def quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


Work = Callable[[argparse.Namespace, Source, Any], dict[str, Any]]
_worker: dict[str, Any] = {}


def run_cells(
    args: argparse.Namespace, source: Source, work: Work, tasks: Sequence[tuple[str, Any]], again: Sequence[str] = ()
) -> int:
    """Run what is missing, ``args.jobs`` at a time, with one progress bar; each result is written when it ends.

    Args:
        args: what :func:`parser` gives.
        source: the images.
        work: from ``args``, ``source`` and a task to the cell; a function of a module.
        tasks: name of the result and task. Those whose result is there are skipped, failures are tried again.
        again: names that are run even if their result is there.

    Returns:
        How many failed. Their results hold ``error``.
    """
    open_tasks = [(name, task) for name, task in tasks if name in again or not done(args.results / f"{name}.json")]
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    failed = 0
    with Progress(TextColumn("{task.description}"), *columns) as progress:
        bar = progress.add_task("cells", total=len(tasks), completed=len(tasks) - len(open_tasks))
        for name, cell in _results(args, source, work, open_tasks):
            write(args.results / f"{name}.json", cell)
            failed += "error" in cell
            shown = [f"{key} {100 * cell[key]:.1f}" for key in ("acc", "asr", "ra", "der") if key in cell]
            progress.console.print(name, *shown, cell.get("error", ""), soft_wrap=True)
            progress.advance(bar)
    return failed


def _results(
    args: argparse.Namespace, source: Source, work: Work, tasks: Sequence[tuple[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if args.jobs <= 1:
        for name, task in tasks:
            yield name, _guarded(work, args, source, task)
        return
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.jobs, len(tasks) or 1), context, _start_worker, (args, source, work)) as pool:
        running: dict[Future[dict[str, Any]], str] = {pool.submit(_in_worker, task): name for name, task in tasks}
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except BrokenProcessPool:
                raise SystemExit("A worker process died (out of memory?). What was written stays; run again.") from None


def _start_worker(args: argparse.Namespace, source: Source, work: Work) -> None:
    quiet()
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    _worker.update(args=args, source=source, work=work)


def _in_worker(task: Any) -> dict[str, Any]:
    return _guarded(_worker["work"], _worker["args"], _worker["source"], task)


def _guarded(work: Work, args: argparse.Namespace, source: Source, task: Any) -> dict[str, Any]:
    try:
        return work(args, source, task)
    except Exception as error:  # a cell that fails is a result, and must not stop the others
        return {**task._asdict(), "error": f"{type(error).__name__}: {error}"}
