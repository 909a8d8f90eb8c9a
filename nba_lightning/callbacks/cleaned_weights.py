"""The cleaned weights, to take home."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn

from nba_lightning.core.checks import expected
from nba_lightning.io.adapters import bare
from nba_lightning.io.weights import save_weights


class CleanedWeights(Callback):
    """Write ``module.model``'s state dict as `.safetensors` at the end of ``fit``, beside the checkpoints.

    Keys and dtypes are those of the network that came in. Nothing is written in a ``fast_dev_run``,
    after an interruption, or if the fit ended before the student had begun.

    Args:
        path: another file to write; ``None`` is ``cleaned.safetensors`` in the folder of the first checkpoint
            callback (or else of the log, or of the Trainer's ``default_root_dir``).
    """

    def __init__(self, path: str | None = None) -> None:
        if path is not None and Path(path).suffix != ".safetensors":
            raise expected("path", "a file that ends in .safetensors", repr(path))
        self.path = path

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        if getattr(trainer, "fast_dev_run", False) or trainer.state.status == "interrupted":
            return
        if getattr(pl_module, "cleaned", True):
            self._write(self.destination(trainer), pl_module)
        else:
            rank_zero_warn("No cleaned weights are written: the fit ended while the teacher was being fine-tuned.")

    def destination(self, trainer: pl.Trainer) -> Path:
        """The file that is written."""
        if self.path is not None:
            return Path(self.path)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        return Path(folder) / "cleaned.safetensors"

    @rank_zero_only
    def _write(self, path: Path, module: pl.LightningModule) -> None:
        model = module.model
        assert isinstance(model, nn.Module)
        save_weights(bare(model).state_dict(), path, getattr(module, "dtypes", None))
        rank_zero_info(f"Cleaned weights: {path}")
