"""Validation figures of every epoch, in memory."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class History(Callback):
    """Keep ``val/...`` of every epoch of a fit in ``epochs``, a list of dictionaries such as ``{"acc": 0.9}``."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the figures."""
        if not trainer.sanity_checking:
            figures = trainer.callback_metrics
            self.epochs.append(
                {name.removeprefix("val/"): float(value) for name, value in figures.items() if name.startswith("val/")}
            )

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far."""
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.epochs[:] = state_dict["epochs"]
