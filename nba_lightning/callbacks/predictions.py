"""Predictions as a file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class PredictionWriter(BasePredictionWriter):
    """Write a CSV at the end of ``predict``: loader, index of the image, predicted class and its probability.

    Args:
        path: the file, relative to the Trainer's ``default_root_dir``; under several processes each writes its own,
            with its rank in the name.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the file."""
        path = Path(trainer.default_root_dir) / self.path
        if trainer.world_size > 1:
            path = path.with_stem(f"{path.stem}-{trainer.global_rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        loaders = predictions if predictions and isinstance(predictions[0], list) else [predictions]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("loader", "index", "predicted", "probability"))
            for loader, batches in enumerate(loaders):
                confidences, classes = torch.cat(list(batches)).float().max(dim=1)
                rows = enumerate(zip(classes.tolist(), confidences.tolist(), strict=True))
                writer.writerows((loader, index, label, f"{value:.6f}") for index, (label, value) in rows)
        rank_zero_info(f"Predictions: {path}")
