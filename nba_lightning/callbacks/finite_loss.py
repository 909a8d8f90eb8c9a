"""Stop at a loss that is not finite, before it reaches a checkpoint."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """The training loss became infinite or NaN."""


class FiniteLoss(Callback):
    """Raise :class:`NonFiniteLossError` with the step at which the loss was first not finite.

    The step is noted on the device and read every ``log_every_n_steps`` steps, at the end of each epoch and before
    any checkpoint is written, so that checking costs no wait in a step and the last checkpoint stays good.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step, and now and then look."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        if self._first is None:
            self._first = torch.full((), -1, dtype=torch.long, device=loss.device)
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        broken = ~torch.isfinite(loss.detach()) & (self._first < 0)
        self._first = torch.where(broken, step, self._first)
        if (step + 1) % max(1, getattr(trainer, "log_every_n_steps", 50)) == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look."""
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look before anything is written."""
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        step = -1 if self._first is None else int(self._first)
        if step >= 0:
            last = getattr(trainer.checkpoint_callback, "last_model_path", "") or getattr(
                trainer.checkpoint_callback, "best_model_path", ""
            )
            kept = f"The last good checkpoint is {last!r}." if last else "No checkpoint was written before it."
            raise NonFiniteLossError(
                f"Expected a finite training loss, but it is NaN or infinite from step {step} on. {kept} "
                "Try a smaller learning rate, or `--trainer.gradient_clip_val 1`."
            )
