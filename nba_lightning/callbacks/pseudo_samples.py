"""Regenerating the pseudo samples as the student changes."""

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from nba_lightning.core.checks import check_at_least


@runtime_checkable
class UsesPseudoSamples(Protocol):
    """What a LightningModule must have for :class:`PseudoSampleRegeneration`."""

    def regenerate(self) -> None:
        """Craft the pseudo samples anew, against the module as it is now."""


@runtime_checkable
class PacesRegeneration(Protocol):
    """What a module has whose pseudo samples are dear for short epochs."""

    def least_epochs_of_pseudo_samples(self) -> int:
        """How many epochs pseudo samples serve at least."""


class PseudoSampleRegeneration(Callback):
    """Call the module's ``regenerate()`` before the first step of every ``every_n_epochs``-th epoch.

    A module that :class:`PacesRegeneration` may stretch this where its epochs are short.

    Args:
        every_n_epochs: epochs from one regeneration to the next; 0 regenerates once and never again.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        check_at_least("every_n_epochs", every_n_epochs, 0)
        self.every_n_epochs, self.epochs = every_n_epochs, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module."""
        if not isinstance(pl_module, UsesPseudoSamples):
            raise TypeError(f"Expected a module with `regenerate()`, such as NBA, but got {type(pl_module).__name__}.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Regenerate if it is time. Not in an epoch hook, which a fit that goes on from an epoch's end does not get."""
        if batch_idx > 0:
            return
        assert isinstance(pl_module, UsesPseudoSamples)
        every = self.every_n_epochs
        if every > 0 and isinstance(pl_module, PacesRegeneration):
            every = max(every, pl_module.least_epochs_of_pseudo_samples())
        due = self.epochs == 0 or (every > 0 and self.epochs % every == 0)
        self.epochs += 1
        if due:
            pl_module.regenerate()

    def state_dict(self) -> dict[str, int]:
        """Epochs so far."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.epochs = state_dict["epochs"]
