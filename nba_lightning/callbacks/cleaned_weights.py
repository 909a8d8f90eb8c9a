"""The cleaned weights, to take home."""

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from nba_lightning.callbacks.guard import Guard
from nba_lightning.core.checks import expected
from nba_lightning.io.adapters import bare
from nba_lightning.io.weights import save_weights, whole_state


class CleanedWeights(Callback):
    """Write ``module.model``'s state dict as `.safetensors` at the end of ``fit``, beside the checkpoints.

    Keys and dtypes are those of the network that came in, also of one that FSDP2 sharded. A file that is there
    already, of another fit, stays: the new one gets a number, as Lightning numbers checkpoints
    (``cleaned-v1.safetensors``); the same fit that goes on replaces it. A fit that ended before its last step, by
    ``max_time`` for instance, writes ``unfinished.safetensors`` instead and says so; one that ``EarlyStopping`` ended
    has ended as was planned. What a :class:`~nba_lightning.callbacks.Guard` among the Trainer's callbacks rejects is
    written as ``rejected.safetensors``. Nothing is written in a ``fast_dev_run`` or after an interruption.

    Args:
        path: another file to write, replaced if it is there; ``None`` is ``cleaned.safetensors`` in the folder of the
            first checkpoint callback (or else of the log, or of the Trainer's ``default_root_dir``).

    Attributes:
        written: the file, after the fit; ``None`` if there is none.
    """

    written: Path | None

    def __init__(self, path: str | None = None) -> None:
        if path is not None and Path(path).suffix != ".safetensors":
            raise expected("path", "a file that ends in .safetensors", repr(path))
        self.path, self.written = path, None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        if getattr(trainer, "fast_dev_run", False) or trainer.state.status == "interrupted":
            return
        path = self.destination(trainer)
        if _rejected(trainer, pl_module):
            path = _free(path.with_stem("rejected"))
        elif _ended_early(trainer):
            path = path.with_stem("unfinished")
            rank_zero_warn(
                f"The fit ended at step {trainer.global_step}, before its last one, so its weights are not called "
                f"cleaned: {path}. Go on by `ckpt_path`, or give it the time."
            )
        elif self.path is None and not trainer.ckpt_path:
            path = _free(path)
        assert isinstance(pl_module.model, nn.Module)
        self._write(path, pl_module, whole_state(bare(pl_module.model)))

    def destination(self, trainer: pl.Trainer) -> Path:
        """The file that is written if the fit ends as planned and none is there."""
        if self.path is not None:
            return Path(self.path)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        return Path(folder) / "cleaned.safetensors"

    @rank_zero_only
    def _write(self, path: Path, module: pl.LightningModule, state: Mapping[str, Tensor]) -> None:
        save_weights(state, path, getattr(module, "dtypes", None))
        self.written = path
        if path.stem != "unfinished":
            rank_zero_info(f"{'Rejected' if path.stem.startswith('rejected') else 'Cleaned'} weights: {path}")


def _rejected(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether a guard among the callbacks rejects the student; asked to conclude first, whatever their order."""
    guards = [one for one in getattr(trainer, "callbacks", []) if isinstance(one, Guard)]
    for guard in guards:
        guard.conclude(trainer, module)
    return any(guard.verdict == "rejected" for guard in guards)


def _ended_early(trainer: pl.Trainer) -> bool:
    planned = trainer.estimated_stepping_batches
    stopped = any(isinstance(one, EarlyStopping) and one.stopped_epoch for one in getattr(trainer, "callbacks", []))
    return trainer.global_step < planned < float("inf") and not stopped


def _free(path: Path) -> Path:
    """The path, or its first version that is no file yet."""
    found, version = path, 0
    while found.exists():
        version += 1
        found = path.with_stem(f"{path.stem}-v{version}")
    return found
