"""How a network is evaluated: ACC on clean images, ASR and RA on triggered ones, class probabilities."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from nba_lightning.core.features import predict
from nba_lightning.core.metrics import IGNORE_LABEL, AttackSuccessRate, RobustAccuracy
from nba_lightning.io.batches import Batch, as_batch, check_values

_PREFIX = {"validate": "val", "test": "test"}


class Evaluation(pl.LightningModule):
    """Base class of modules with a classifier in ``model``.

    The first loader of clean images logs ``val/acc`` (``test/acc``); loaders of triggered images, which are those whose
    batches carry targets (:class:`~nba_lightning.io.batches.Batch`), log ``val/asr`` and ``val/ra``. Further loaders of
    clean images log ``val/acc/dataloader_idx_1`` and so on, as Lightning names them. All are fractions.
    """

    model: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.clean_metrics, self.triggered_metrics = nn.ModuleDict(), nn.ModuleDict()
        for stage, prefix in _PREFIX.items():
            accuracy = MulticlassAccuracy(average="micro", ignore_index=IGNORE_LABEL)
            triggered = {"asr": AttackSuccessRate(), "ra": RobustAccuracy()}
            self.clean_metrics[stage] = MetricCollection({"acc": accuracy}, prefix=f"{prefix}/")
            self.triggered_metrics[stage] = MetricCollection(dict(triggered), prefix=f"{prefix}/", compute_groups=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [0, 1] to logits `(B, K)`."""
        return predict(self.model, images)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch into ACC, or into ASR and RA."""
        self._count("validate", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch into ACC, or into ASR and RA."""
        self._count("test", batch, batch_idx, dataloader_idx)

    def _count(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        found = as_batch(batch, self.model)
        labels = labels_of(found)
        logits = self(found.images)
        if batch_idx == 0:
            check_values(batch, self.model, logits.shape[1])
        preds, size = logits.argmax(dim=1), len(found)
        settings: dict[str, Any] = {"on_step": False, "on_epoch": True, "prog_bar": True, "batch_size": size}
        if found.targets is None and dataloader_idx > 0:
            right = (preds == labels).float().mean()
            self.log(f"{_PREFIX[stage]}/acc", right, sync_dist=True, **settings)
            return
        metrics = (self.clean_metrics if found.targets is None else self.triggered_metrics)[stage]
        assert isinstance(metrics, MetricCollection)
        metrics.update(preds, labels, *([] if found.targets is None else [found.targets]))
        self.log_dict(metrics, add_dataloader_idx=False, **settings)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities `(B, K)`."""
        images = as_batch(batch, self.model).images
        if batch_idx == 0:
            check_values(batch, self.model)
        probabilities: Tensor = self(images).softmax(dim=1)
        return probabilities


def labels_of(batch: Batch) -> Tensor:
    """The labels `(B,)` of a batch, to learn or to evaluate by.

    Raises:
        ValueError: if it has none.
    """
    if batch.labels is None:
        raise ValueError("Expected a batch with labels, but got images alone.")
    return batch.labels
