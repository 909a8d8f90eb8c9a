"""Predictions as a file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from nba_lightning.io.batches import Batch

_COLUMNS = ("loader", "index", "name", "predicted", "class", "probability")


class PredictionWriter(BasePredictionWriter):
    """Write a CSV at the end of ``predict``, one row for each image, by whatever number of processes.

    Columns: the loader; the image's index in its data set; its name (the file where there is one); the predicted class
    number, the class's name where it is known, and its probability. Padding is left out and no image comes twice.

    Args:
        path: the file, relative to the Trainer's ``default_root_dir``.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._kept: list[tuple[int, Tensor | None, Tensor, Tensor]] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a file."""
        self._kept = []

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep a batch's answers, on the device."""
        confidences, classes = prediction.float().max(dim=1)
        if isinstance(batch, Batch) and batch.indices is not None:
            indices: Tensor | None = batch.indices
        elif batch_indices is not None and len(batch_indices) == len(classes):
            indices = torch.as_tensor(list(batch_indices))
        else:
            indices = None  # a loader that does not say which images it gives: they are counted
        self._kept.append((dataloader_idx, indices, classes, confidences))

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, from the first process."""
        rows = self._rows()
        if trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, rows)
            rows = [row for part in everyone for row in part]
        if trainer.is_global_zero:
            self._write(trainer, {row[:2]: row[2:] for row in rows})
        self._kept = []

    def _rows(self) -> list[tuple[int, int, int, float]]:
        rows, counted = [], dict[int, int]()
        for loader, indices, classes, confidences in self._kept:
            start = counted.get(loader, 0)
            counted[loader] = start + len(classes)
            numbers = range(start, start + len(classes)) if indices is None else indices.tolist()
            answers = zip(numbers, classes.tolist(), confidences.tolist(), strict=True)
            rows += [(loader, index, label, value) for index, label, value in answers if index >= 0]
        return rows

    def _write(self, trainer: pl.Trainer, found: dict[tuple[int, int], tuple[int, float]]) -> None:
        path = Path(trainer.default_root_dir) / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        loaders = trainer.predict_dataloaders
        each = loaders if isinstance(loaders, list | tuple) else [loaders]
        sets = [getattr(loader, "dataset", None) for loader in each]
        names = [_class_names(trainer, images) for images in sets]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for (loader, index), (label, value) in sorted(found.items()):
                name = _image_name(sets[loader], index)
                writer.writerow((loader, index, name, label, names[loader].get(label, ""), f"{value:.6f}"))
        rank_zero_info(f"Predictions: {path}")


def _image_name(images: Any, index: int) -> str:
    """The file of an image where its data set knows it: a set of ours, or one like torchvision's ImageFolder."""
    source = getattr(images, "source", None)
    if source is not None and hasattr(source, "name_of"):
        return str(source.name_of(index))
    samples = getattr(images, "samples", None)
    return str(samples[index][0]) if isinstance(samples, list) and index < len(samples) else ""


def _class_names(trainer: pl.Trainer, images: Any) -> dict[int, str]:
    source = getattr(getattr(trainer, "datamodule", None), "source", None)
    classes = getattr(images, "classes", None) or getattr(source, "classes", None) or ()
    return {number: str(name) for number, name in enumerate(classes)}
