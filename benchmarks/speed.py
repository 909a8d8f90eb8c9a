"""What Lightning, crafting, the input path and several processes cost or save: ratios, each within one run.

    python benchmarks/speed.py

Random images of CIFAR-10's shape and WideResNet-16-1 (``--network`` for another). Each ratio is taken over ``--rounds``
alternating rounds and given as mean and sample standard deviation; it goes into ``results/speed.json`` when it is
there, so a run that was stopped keeps what it has. ``--only`` names some of them; those that end in images or px show
the growth of time and memory with the set and with the size of its images.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from common import Noise, network, quiet, trainer
from meter import metered
from timing import Epoch, Pictures, autocast, batches, device, fit, ratio, timed, write_ratios
from torch import nn
from torch.utils.data import DataLoader

from nba_lightning import NBA, BackdoorDataModule, Classifier, FineTuning
from nba_lightning.behaviors import alignment_loss
from nba_lightning.core import augmentation
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.features import features
from nba_lightning.core.functional import kl_divergence
from nba_lightning.pseudo import TriggerFamilies
from nba_lightning.training.verification import Verification


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


class Unverified(Verification):
    """Keeps all, so that an epoch is timed without what comes once, at the end of a fit."""

    def keep(self, *args: Any, **kwargs: Any) -> float:
        return 1.0


def aligned(args: argparse.Namespace, **options: Any) -> NBA:
    return NBA(network(args), teacher=network(args), **({"verification": Unverified()} | options))


def nba_over_its_passes(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch, search, triggers, mixing and optimiser included, over its passes through networks and losses."""
    loader = batches(args, 50)

    def bare() -> float:
        student, teacher = network(args).to(device()), network(args).to(device()).eval().requires_grad_(False)
        suspicious, sample = copy.deepcopy(teacher), aligned(args)
        layers, form, terms, pseudo = sample.layers, sample.behavior, sample.terms, sample.pseudo
        assert isinstance(pseudo, TriggerFamilies)
        tried = torch.rand(pseudo.candidates * pseudo.images_each, 3, args.side, args.side, device=device())

        def loop() -> None:
            student.eval()
            with torch.no_grad(), autocast(args):
                for _ in pseudo.families:
                    kl_divergence(teacher(tried), student(tried))
            student.train()
            for given, _ in loader:
                images = given.to(device())
                student.zero_grad()
                with autocast(args):
                    with torch.no_grad():
                        wanted, known = features(teacher, images, layers)[1], suspicious(images)
                    logits, observed = features(student, images, layers)
                    loss = terms.suspicious * kl_divergence(known, logits).mean()
                    loss = loss + terms.alignment * alignment_loss(form(observed), form(wanted))
                loss.backward()

        return timed(loop)

    return ratio(args, lambda: fit(args, aligned(args), loader), bare)


def nba_over_fine_tuning(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch over a fine-tuning epoch."""
    loader = batches(args, 50)
    return ratio(
        args,
        lambda: fit(args, aligned(args), loader),
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
    plain: list[nn.Module] = [network(args).to(memory_format=torch.contiguous_format) for _ in range(2)]
    module = NBA(plain[0], teacher=plain[1], verification=Unverified(), **options)
    runner, clock = trainer(args, 2), Epoch()
    runner.callbacks.insert(0, clock)
    runner.fit(module, batches(args, 50))  # the first epoch compiles; the second is timed
    return clock.seconds


def channels_last_over_plain(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch with ``channels_last`` over one without."""
    return ratio(args, lambda: _variant(args, channels_last=True), lambda: _variant(args, channels_last=False))


def compiled_over_plain(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch with ``compile`` over one without, both channels-last; compiling itself is left out."""
    fast = {"channels_last": True}
    return ratio(args, lambda: _variant(args, compile=True, **fast), lambda: _variant(args, **fast))


def two_processes_over_one(args: argparse.Namespace) -> dict[str, float]:
    """An NBA epoch of two processes (one thread each on the CPU) over one process's, with the same global batch."""

    def run(processes: int) -> float:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        settings = ["--images", str(args.images), "--precision", args.precision, "--network", args.network]
        settings += ["--side", str(args.side)]
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
    runner.fit(aligned(args), datamodule=data)
    if runner.is_global_zero:
        print("seconds:", clock.seconds)


def memory_of_nba_over_fine_tuning(args: argparse.Namespace, **options: Any) -> dict[str, float]:
    """Peak memory of a fit on top of what was there before it."""

    def peak(module: Classifier) -> float:
        loader = batches(args, 50)
        with metered(module) as meter:
            fit(args, module, loader)
        return meter.peak_memory_mib

    return ratio(
        args,
        lambda: peak(aligned(args, **options)),
        lambda: peak(FineTuning(network(args))),
    )


def memory_of_verified_nba_over_fine_tuning(args: argparse.Namespace) -> dict[str, float]:
    """The same with what comes at the end of a fit; at least 200 images, else little of it is done."""
    return memory_of_nba_over_fine_tuning(args, verification=Verification())


def slices_over_gather(args: argparse.Namespace) -> dict[str, float]:
    """Crop and flip of a batch on the CPU, image by image, over the same by one gather."""
    images, augment = torch.rand(64, 3, args.side, args.side), RandomCropFlip()

    def seconds(pixels: int) -> float:
        with patch.object(augmentation, "_SLICED_FROM", pixels):
            return timed(lambda: [augment(images) for _ in range(5)])

    return ratio(args, lambda: seconds(0), lambda: seconds(images[0].numel() + 1))


Measured = Callable[[argparse.Namespace], dict[str, float]]


def at(measured: Measured, **changes: int) -> Measured:
    """The same with other images or another size."""
    return lambda args: {**measured(argparse.Namespace(**{**vars(args), **changes})), **changes}


RATIOS: dict[str, Measured] = {
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
        memory_of_verified_nba_over_fine_tuning,
    )
}
RATIOS |= {f"nba_over_fine_tuning_of_{n}_images": at(nba_over_fine_tuning, images=n) for n in (100, 500, 2500)}
for side in (64, 128, 224):
    RATIOS |= {
        f"{function.__name__}_at_{side}_px": at(function, side=side, images=100)
        for function in (step_over_bare_loop, nba_over_fine_tuning, memory_of_nba_over_fine_tuning, slices_over_gather)
    }


def possible() -> list[str]:
    """All ratios; two processes want a GPU each."""
    crowded = torch.cuda.is_available() and torch.cuda.device_count() < 2
    return [name for name in RATIOS if not (crowded and name == two_processes_over_one.__name__)]


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RATIOS, default=possible(), help="these ratios")
    parser.add_argument("--images", type=int, default=1500, help="images of an epoch")
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
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
    write_ratios(args, args.only, lambda name: RATIOS[name](args))


if __name__ == "__main__":
    main()
