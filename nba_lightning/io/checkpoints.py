"""Lightning's checkpoint files, read without running code from them; a broken one is named with the newest good one."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from nba_lightning.io.files import whole

BROKEN = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What reading a file that is no whole checkpoint may raise."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Plugin of the Trainer; the command line uses it by default.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(plugins=[SafeCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; where the disk is full, the file of that name that was there before stays.

        Lightning writes into another folder and copies the file where that is on another disk.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(Path(path)) as unfinished:
            super().save_checkpoint(checkpoint, unfinished, storage_options)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain values only, whatever ``weights_only`` says.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is truncated, corrupt, or would need unpickling code.
        """
        try:
            loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except BROKEN as error:
            good = self.newest_good(Path(path))
            advice = "No other checkpoint lies beside it." if good is None else f"The newest good one is {str(good)!r}."
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"Checkpoint {str(path)!r} is truncated or corrupt ({reason}). {advice}") from error
        return loaded

    def newest_good(self, broken: Path) -> Path | None:
        """The newest other checkpoint in the folder that can be read."""
        others = [path for path in broken.parent.glob("*.ckpt") if path.resolve() != broken.resolve()]
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                super().load_checkpoint(path, weights_only=True)
            except BROKEN:
                continue
            return path
        return None
