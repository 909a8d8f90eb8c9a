"""Timing what is compared: alternating rounds, epochs without what is around them, random images."""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchvision.transforms as T
from common import provenance, spread, trainer, write
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset


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


def write_ratios(args: argparse.Namespace, names: Iterable[str], measured: Callable[[str], dict[str, float]]) -> None:
    """Measure one ratio after the other into ``args.result``, beside those that are there; each is written at once."""
    result = json.loads(args.result.read_text()) if args.result.exists() else {"ratios": {}}
    for name in names:
        found = measured(name)
        result["ratios"][name] = {"images": args.images, **found}
        result |= provenance(args)
        write(args.result, result)
        print(f"{name}: {found['mean']} ± {found['std']} (n = {found['n']})", flush=True)


def batches(args: argparse.Namespace, size: int, times: int = 1) -> DataLoader[Any]:
    images, labels = torch.rand(times * args.images, 3, args.side, args.side), torch.arange(times * args.images) % 10
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
