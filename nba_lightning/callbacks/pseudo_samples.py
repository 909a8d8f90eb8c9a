"""Regenerating the pseudo samples as the student changes."""

from collections.abc import Iterator
from itertools import count
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nba_lightning.core.checks import check_at_least
from nba_lightning.io.adapters import unpack


@runtime_checkable
class UsesPseudoSamples(Protocol):
    """What a LightningModule must have for :class:`PseudoSampleRegeneration`."""

    def enter_phase(self) -> bool:
        """Begin what this epoch is for; whether it uses pseudo samples."""

    def regenerate_pseudo_samples(self, batches: Iterator[Tensor]) -> None:
        """Craft from endless clean images `(B, C, H, W)` on the device."""


class PseudoSampleRegeneration(Callback):
    """Regenerate the pseudo samples at the start of every ``every_n_epochs``-th epoch that uses them.

    Args:
        every_n_epochs: epochs from one regeneration to the next; 0 crafts once and never again.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        check_at_least("every_n_epochs", every_n_epochs, 0)
        self.every_n_epochs = every_n_epochs
        self.epochs, self._begun = 0, -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module."""
        if not isinstance(pl_module, UsesPseudoSamples):
            raise TypeError(
                "Expected a module with `enter_phase` and `regenerate_pseudo_samples`, such as NBA, but got "
                f"{type(pl_module).__name__}."
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Regenerate if it is time."""
        assert isinstance(pl_module, UsesPseudoSamples)
        self._begun = trainer.current_epoch
        if not pl_module.enter_phase():
            return
        due = self.epochs == 0 or (self.every_n_epochs > 0 and self.epochs % self.every_n_epochs == 0)
        self.epochs += 1
        if due:
            pl_module.regenerate_pseudo_samples(clean_batches(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Do so here after a checkpoint from the last step of an epoch: Lightning then calls no hook for the next."""
        if batch_idx == 0 and self._begun != trainer.current_epoch:
            self.on_train_epoch_start(trainer, pl_module)

    def state_dict(self) -> dict[str, int]:
        """Epochs that used pseudo samples so far."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.epochs = state_dict["epochs"]


def clean_batches(trainer: pl.Trainer) -> Iterator[Tensor]:
    """Endless training images `(B, C, H, W)` in [0, 1], on the device and through the hooks of the DataModule."""
    network: nn.Module | None = getattr(trainer.lightning_module, "model", None)
    data: Any = getattr(trainer, "datamodule", None)
    loader, numbers = beside(trainer.train_dataloader), count()
    while True:
        empty = True
        for batch in loader:
            empty = False
            # A batch beside the training steps: a BackdoorDataModule draws its augmentation by this number instead.
            if hasattr(data, "extra_batch"):
                data.extra_batch = next(numbers)
            ready = on_device(trainer, batch)
            if hasattr(data, "extra_batch"):
                data.extra_batch = None
            yield unpack(ready, network)[0]
        if empty:
            raise RuntimeError("Expected the training loader to yield batches again, but it gave none.")


def beside(loader: Any) -> Any:
    """A loader to go through while the Trainer goes through the given one.

    Persistent workers serve one pass at a time: a second one would take the first one's batches away. So their images
    are read here instead.
    """
    if not (isinstance(loader, DataLoader) and loader.persistent_workers and loader.num_workers):
        return loader
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
    return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)


def on_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A loader's batch as a step would get it: in the Trainer's precision, on the device, through all hooks."""
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
