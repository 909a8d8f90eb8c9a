"""Our side of ``peers.py``: seconds per image of input, of an epoch and of an evaluation."""

import argparse
import time
from typing import Any

import lightning.pytorch as pl
import torch
from common import Noise, network, trainer
from timing import fit
from torch import nn

from nba_lightning import BackdoorDataModule, Classifier
from nba_lightning.attacks import Attack
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.networks import Normalize

BATCH = 64


class Nothing(pl.LightningModule):
    """Reads batches, and normalises them where the other side's loader does."""

    def __init__(self, normalize: Normalize | None = None) -> None:
        super().__init__()
        self.normalize = normalize

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.normalize is not None:
            self.normalize(batch.images)

    def configure_optimizers(self) -> None:
        return None


class Constant(nn.Module):
    """Ten numbers for any image, to time a loop of which the network cannot be taken out."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


class Tested(pl.Callback):
    """Seconds of testing alone."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.start


def plain(args: argparse.Namespace) -> nn.Module:
    """A network as a user has it; our module chooses the order of its weights for itself."""
    return network(args).to(memory_format=torch.contiguous_format)


def data(args: argparse.Namespace, attack: Attack | None, **options: Any) -> BackdoorDataModule:
    """All images in training, none held out, so that both sides read as many."""
    options = {"clean_fraction": 0.1, "validation_fraction": 0.0, "augment": RandomCropFlip(), **options}
    return BackdoorDataModule(Noise(args.images), attack, batch_size=BATCH, eval_batch_size=BATCH, **options)


def epoch(args: argparse.Namespace, module: pl.LightningModule, given: BackdoorDataModule) -> float:
    """Seconds per image of an epoch."""
    return fit(args, module, given) / args.images


def test(args: argparse.Namespace, given: BackdoorDataModule) -> float:
    """Seconds per image of clean and of triggered images."""
    given.setup()
    images = sum(len(loader.dataset) for loader in given.test_dataloader())
    runner, clock = trainer(args, 1), Tested()
    runner.callbacks.insert(0, clock)
    runner.test(Classifier(plain(args)), given, verbose=False)
    return clock.seconds / images
