"""What Lightning, crafting, the input path and several processes cost or save: ratios, each within one run.

    python benchmarks/speed.py

Random images of CIFAR-10's shape and WideResNet-16-1 (``--network`` for another). Each ratio is taken over ``--rounds``
alternating rounds and given as mean and sample standard deviation; it goes into ``results/speed.json`` when it is
there, so a run that was stopped keeps what it has. ``--only`` names some of them.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from common import SHAPE, Noise, network, provenance, quiet, spread, trainer
from meter import metered
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nba_lightning import NBA, BackdoorDataModule, Classifier, FineTuning
from nba_lightning.behaviors import alignment_loss
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.features import features
from nba_lightning.core.functional import kl_divergence


class Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision's sets do: an array becomes a PIL image and goes through transforms, one by one."""

    def __init__(self, images: Tensor) -> None:
        self.images: Any = images.permute(0, 2, 3, 1).numpy()
        self.transform = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(np.asarray(self.images[index]))), index % 10


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(args: argparse.Namespace, first: Callable[[], float], second: Callable[[], float]) -> dict[str, float]:
    """Seconds of ``first`` over those of ``second``, alternating after one round of warming up."""
    first(), second()
    found = []
    for index in range(args.rounds):
        if index % 2:
            below = second()
            found.append(first() / below)
        else:
            above = first()
            found.append(above / second())
    return spread(found)


def batches(args: argparse.Namespace, size: int, times: int = 1) -> DataLoader[Any]:
    images, labels = torch.rand(times * args.images, *SHAPE), torch.arange(times * args.images) % 10
    return DataLoader(TensorDataset(images, labels), size, drop_last=True)


class Epoch(pl.Callback):
    """Seconds of training alone, without what a Trainer does around it."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start


def fit(args: argparse.Namespace, module: pl.LightningModule, loader: Any) -> float:
    """Seconds of one epoch."""
    runner, clock = trainer(args, 1), Epoch()
    runner.callbacks.insert(0, clock)  # before any callback that works at the start of an epoch
    if isinstance(loader, pl.LightningDataModule):
        runner.fit(module, datamodule=loader)
    else:
        runner.fit(module, loader)
    return clock.seconds


def autocast(args: argparse.Namespace) -> torch.autocast:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, torch.bfloat16, enabled=args.precision == "bf16-mixed")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step_over_bare_loop(args: argparse.Namespace) -> dict[str, float]:
    """An epoch of Classifier under the Trainer over a loop of PyTorch with the same arithmetic."""
    loader = batches(args, 128, times=4)

    def bare() -> float:
        model = network(args).to(device())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))

        def loop() -> None:
            for batch in loader:
                images, labels = (part.to(device()) for part in batch)
                optimizer.zero_grad()
                with autocast(args):
                    loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                schedule.step()

        return timed(loop)

    return ratio(args, lambda: fit(args, Classifier(network(args)), loader), bare)


def nba_over_its_passes(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch, crafting and optimiser included, over its forward and backward passes and losses alone."""
    loader = batches(args, 50)

    def bare() -> float:
        student, teacher = network(args).to(device()), network(args).to(device()).eval().requires_grad_(False)
        suspicious, sample = copy.deepcopy(teacher), NBA(network(args), teacher=network(args))
        layers, form, perturbation = sample.layers, sample.behavior, torch.zeros(1, *SHAPE, device=device())

        def craft(images: Tensor) -> None:
            leaf = perturbation.clone().requires_grad_()
            found = kl_divergence(teacher(images + leaf), student(images + leaf)).sum()
            torch.autograd.grad(found, leaf)

        def loop() -> None:
            student.eval()
            with autocast(args):
                for images, _ in islice(cycle(loader), 10):
                    craft(images.to(device()))
            student.train()
            for batch in loader:
                images, labels = (part.to(device()) for part in batch)
                student.zero_grad()
                with autocast(args):
                    with torch.no_grad():
                        answers, wanted = features(suspicious, images, layers)
                    logits, observed = features(student, images + perturbation, layers)
                    loss = 2 * F.cross_entropy(logits, labels) + 4 * kl_divergence(answers, logits).mean()
                    loss = loss + alignment_loss(form(observed), form(wanted))
                loss.backward()

        return timed(loop)

    return ratio(args, lambda: fit(args, NBA(network(args), teacher=network(args)), loader), bare)


def nba_over_fine_tuning(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch that aligns over a fine-tuning epoch."""
    loader = batches(args, 50)
    return ratio(
        args,
        lambda: fit(args, NBA(network(args), teacher=network(args)), loader),
        lambda: fit(args, FineTuning(network(args)), loader),
    )


def loader_over_input_path(args: argparse.Namespace) -> dict[str, float]:
    """A standard torchvision loader over ours: from uint8 images to augmented float batches, no network."""
    number = 4 * args.images
    source = Noise(number)
    pictures = DataLoader(Pictures(source.images.read(torch.arange(number))), 128, shuffle=True, drop_last=True)
    data = BackdoorDataModule(source, None, augment=RandomCropFlip(), batch_size=128)

    class Nothing(pl.LightningModule):
        """Reads batches."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    def theirs() -> float:
        return timed(lambda: [None for _ in pictures])

    # Our share of the poisoned training's images is what the partition leaves: per image, not per epoch.
    data.setup()
    share = len(data.partition.training) / number
    return ratio(args, theirs, lambda: fit(args, Nothing(), data) / share)


def _variant(args: argparse.Namespace, **options: Any) -> float:
    model: nn.Module = network(args).to(memory_format=torch.contiguous_format)
    module = NBA(model, teacher=network(args), **options)  # other random weights, as a teacher has
    runner, clock = trainer(args, 2), Epoch()
    runner.callbacks.insert(0, clock)
    runner.fit(module, batches(args, 50))  # the first epoch compiles; the second is timed
    return clock.seconds


def channels_last_over_plain(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch with ``channels_last`` over one without."""
    return ratio(args, lambda: _variant(args, channels_last=True), lambda: _variant(args))


def compiled_over_plain(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch with ``compile`` over one without, both channels-last; compiling itself is left out."""
    fast = {"channels_last": True}
    return ratio(args, lambda: _variant(args, compile=True, **fast), lambda: _variant(args, **fast))


def two_processes_over_one(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch of two processes (one thread each on the CPU) over one process's, with the same global batch."""

    def run(processes: int) -> float:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        settings = ["--images", str(args.images), "--precision", args.precision, "--network", args.network]
        command = [*launch, __file__, "--processes", str(processes), *settings]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(ran.stdout.split("seconds:")[1].split()[0])

    return ratio(args, lambda: run(2), lambda: run(1))


def processes(args: argparse.Namespace) -> None:
    """What each process of :func:`two_processes_over_one` does."""
    clock = Epoch()
    runner = trainer(args, 2, devices=args.processes, strategy="ddp" if args.processes > 1 else "auto")
    runner.callbacks.insert(0, clock)
    data = BackdoorDataModule(
        Noise(args.images * 20), None, train_on="clean", augment=RandomCropFlip(), batch_size=50 // args.processes
    )
    runner.fit(NBA(network(args), teacher=network(args)), datamodule=data)
    if runner.is_global_zero:
        print("seconds:", clock.seconds)


def memory_of_nba_over_fine_tuning(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a fit on top of what was there before it."""

    def peak(module: Classifier) -> float:
        loader = batches(args, 50)
        with metered(module) as meter:
            fit(args, module, loader)
        return meter.peak_memory_mib

    return ratio(
        args,
        lambda: peak(NBA(network(args), teacher=network(args))),
        lambda: peak(FineTuning(network(args))),
    )


RATIOS = {
    function.__name__: function
    for function in (
        step_over_bare_loop,
        nba_over_its_passes,
        nba_over_fine_tuning,
        loader_over_input_path,
        channels_last_over_plain,
        compiled_over_plain,
        two_processes_over_one,
        memory_of_nba_over_fine_tuning,
    )
}


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RATIOS, default=list(RATIOS), help="these ratios")
    parser.add_argument("--images", type=int, default=1500, help="images of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", default="wide_resnet16_1", help="a file of configs/network")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "speed.json")
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work, args.source, args.jobs = Path("runs/benchmark"), "random images, 3x32x32", 1
    torch.manual_seed(0)
    if args.processes:
        processes(args)
        return
    result = json.loads(args.result.read_text()) if args.result.exists() else {"ratios": {}}
    for name in args.only:
        found: dict[str, float] = RATIOS[name](args)
        result["ratios"][name] = {**found, "images": args.images}
        result |= provenance(args)
        args.result.parent.mkdir(parents=True, exist_ok=True)
        args.result.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {found['mean']} ± {found['std']} (n = {found['n']})", flush=True)


if __name__ == "__main__":
    main()
