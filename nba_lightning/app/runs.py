"""Runs do not destroy each other's results, and say what they keep."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from nba_lightning.core.checks import expected

_RESULTS = ("last.ckpt", "cleaned.safetensors")


class KeepConfig(SaveConfigCallback):
    """Write a fit's configuration beside its log, as ``config-1.yaml`` where an earlier one lies there already."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose a free name and write; evaluation writes none, which would stand for the fit's."""
        if stage != "fit" or self.already_saved:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        number = 0
        while (folder / self.config_filename).exists():
            number += 1
            self.config_filename = f"config-{number}.yaml"
        self.config = self.config.clone()
        self.config["overwrite"] = False  # a permission for one run, not for all that start from its file
        super().setup(trainer, pl_module, stage)


def results_folder(trainer: pl.Trainer) -> Path:
    """Where this run's checkpoints and cleaned weights go."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return Path(callback.dirpath)
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    return folder if callback is None else folder / "checkpoints"


def check_free(trainer: pl.Trainer, ckpt_path: str | None, overwrite: bool) -> None:
    """Refuse a new fit into the results of another; say when there is nothing to go on from.

    Args:
        trainer: the fit's Trainer.
        ckpt_path: the checkpoint to go on from; ``last`` is the newest of the folder.
        overwrite: whether the results of another run may be replaced.

    Raises:
        ValueError: if the folder holds the results of another run, or cannot be one.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    _check_writable(trainer.default_root_dir, "trainer.default_root_dir")
    folder = results_folder(trainer)
    _check_writable(folder, "checkpoint.dirpath")
    found = [name for name in _RESULTS if (folder / name).exists()]
    if ckpt_path == "last" and not _has_last(folder):
        rank_zero_info(
            f"There is no last.ckpt in {folder}: this fit starts from the beginning. "
            "(`--checkpoint.dirpath` names the folder of a run.)"
        )
    if overwrite and ckpt_path is None:
        (folder / "cleaned.safetensors").unlink(missing_ok=True)  # else the new one would get a number
    elif found and ckpt_path is None and not _requeued(trainer):
        raise ValueError(
            f"Expected `--checkpoint.dirpath` to be a folder without results, but got {str(folder)!r} with "
            f"{' and '.join(found)} of another run. Use `--ckpt_path last` to go on with it, another folder "
            "for a new run, or `--overwrite true` to replace it."
        )


def check_last(trainer: pl.Trainer, ckpt_path: str | None) -> None:
    """Refuse to evaluate a network without the checkpoint that was asked for.

    Raises:
        ValueError: if ``ckpt_path`` is ``last`` and there is none.
    """
    folder = results_folder(trainer)
    if ckpt_path == "last" and not _has_last(folder):
        raise expected("--checkpoint.dirpath", "a folder with last.ckpt for `--ckpt_path last`", repr(str(folder)))


def _has_last(folder: Path) -> bool:
    return any(folder.glob("last*.ckpt"))


def _check_writable(folder: str | Path, option: str) -> None:
    """Raise now, not after the first epoch, if the folder cannot be made or written."""
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not existing.is_dir():
        raise expected(f"--{option}", "a folder", f"{str(folder)!r}: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise expected(f"--{option}", "a folder that may be written", f"{str(folder)!r}: permission denied")


def check_checkpoint(path: str | None) -> None:
    """Raise before any data is read if this names no checkpoint.

    Raises:
        ValueError: if it is neither an existing file (or the folder of a sharded one) nor a name of Lightning's.
    """
    if path is None or path in ("last", "best", "hpc") or "://" in path or path.startswith("registry"):
        return
    if not Path(path).exists():
        raise expected("ckpt_path", "an existing checkpoint, last or best", repr(path))
    if Path(path).is_dir() and not (Path(path) / "meta.pt").exists():
        raise expected("ckpt_path", "a checkpoint file, last or best", f"the folder {path!r}")


def _requeued(trainer: pl.Trainer) -> bool:
    """Whether SLURM starts an interrupted job anew, which goes on from a checkpoint that Lightning finds itself."""
    return "SLURM_JOB_ID" in os.environ and any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))


def kept(trainer: Any) -> str:
    """What an interrupted run leaves, in a sentence."""
    if not isinstance(trainer, pl.Trainer):
        return "Interrupted."
    last = results_folder(trainer) / "last.ckpt"
    if last.exists():
        return f"Interrupted. Kept is {last}; the same command with `--ckpt_path last` goes on from there."
    return "Interrupted before the first checkpoint was written; nothing was kept."


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Lightning ignores Ctrl-C from the first one on; whoever called this must not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
