"""Scans under a Lightning Trainer: ``trainer.test(Scanning(network, scans), datamodule)``."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from nba_lightning.core.checks import check_at_least, expected
from nba_lightning.scan.base import Reservoir, Scan, images_of
from nba_lightning.scan.result import ScanResult


class Scanning(pl.LightningModule):
    """Run scans on a network by the Trainer's test loop, on its device and with its loaders.

    Clean images come from the first test loader; others (such as triggered images of a research set-up) are not looked
    at. Logs ``scan/<method>/p_value``, the smallest p-value of all classes; all results are in :attr:`results`. With
    several processes the first one scans, by the images that it was given.

    Args:
        network: images `(B, C, H, W)` in [0, 1] to logits `(B, K)`.
        scans: what to run, one after another.

    Raises:
        ValueError: without a scan, or (in a Trainer) where the network is spread over several devices.
    """

    def __init__(self, network: nn.Module, scans: Sequence[Scan]) -> None:
        super().__init__()
        check_at_least("len(scans)", len(scans), 1)
        self.network, self.scans = network, nn.ModuleList(scans)
        self.results: list[ScanResult] = []

    def setup(self, stage: str) -> None:
        """Refuse what only holds a part of the network."""
        if isinstance(self.trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise expected(
                "strategy", "one with the whole network on each device", type(self.trainer.strategy).__name__
            )

    def on_test_epoch_start(self) -> None:
        """Begin with no images."""
        scans = [scan for scan in self.scans if isinstance(scan, Scan)]
        self._kept = [Reservoir(scan.max_images, scan.seed) for scan in scans]
        self.results = []

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep some of the images."""
        if dataloader_idx == 0:
            found = images_of(batch, self.network)
            for kept in self._kept:
                kept.add(*found)

    def on_test_epoch_end(self) -> None:
        """Scan by what was kept."""
        if self.trainer.is_global_zero:
            for scan, kept in zip(self.scans, self._kept, strict=True):
                assert isinstance(scan, Scan)
                # No bar of our own: rich shows one at a time, and the Trainer has it.
                self.results.append(scan.scan(self.network, *kept.content(), progress=False))
        self.results = self.trainer.strategy.broadcast(self.results)
        self._kept = []
        for result in self.results:
            self.log(f"scan/{result.method}/p_value", result.p_value, rank_zero_only=True)
