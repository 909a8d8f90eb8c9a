"""A chain of steps that each resume: what was asked for and what is done, in a file of the output folder."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only

from nba_lightning.core.checks import expected
from nba_lightning.io.files import whole

T = TypeVar("T")
STATE = "state.json"
RESULTS = ("cleaned.safetensors", "rejected.safetensors", "teacher.safetensors", "report.json", "scan.json")


class Chain:
    """The steps of one run, by name; each leaves plain values, and is not done again.

    Args:
        folder: the output folder; it is made.
        arguments: all that decides what comes out, plain values.
        needs: bytes that the run writes, about.

    Raises:
        ValueError: if the folder is a file, cannot be written, has too little space, or holds another run's results.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], needs: int = 0) -> None:
        self.folder = folder
        check_folder(folder)
        self.arguments = json.loads(json.dumps(arguments))
        self.done: dict[str, Any] = {}
        self._before, self._begin = 0.0, time.monotonic()
        if (folder / STATE).is_file():
            self._go_on()
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if not self.done and free < needs:
            got = f"{str(folder)!r} with {free / 2**20:,.0f} MiB free"
            raise expected("output", f"on a disk with about {needs / 2**20:,.0f} MiB free", got)
        self._write()

    @property
    def seconds(self) -> float:
        """What the run took so far, with what was done before it was interrupted."""
        return round(self._before + time.monotonic() - self._begin, 1)

    def step(self, name: str, work: Callable[[], T]) -> T:
        """Do a step, or give what it gave when it was done before."""
        if name not in self.done:
            self.done[name] = plain(work())
            self._write()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()  # other processes read the files that the first one has written
        result: T = self.done[name]
        return result

    def _go_on(self) -> None:
        try:
            saved = json.loads((self.folder / STATE).read_text())
            before, self.done, self._before = saved["arguments"], saved["done"], saved["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            got = f"{str(self.folder)!r}, whose {STATE} is broken"
            raise expected("output", "the folder of a run, or an empty one", got) from error
        both = {
            key: (before.get(key), self.arguments.get(key)) for key in sorted(before.keys() | self.arguments.keys())
        }
        other = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
        if other and self.done:
            listed = ", ".join(f"`{key}` was {_short(was)}, is {_short(now)}" for key, (was, now) in other.items())
            raise ValueError(
                f"Expected `output` to be a folder without another run's results, but got {str(self.folder)!r}, whose "
                f"run had other arguments: {listed}. Choose another folder, or go on with the same arguments."
            )

    @rank_zero_only
    def _write(self) -> None:
        write_json(self.folder / STATE, {"arguments": self.arguments, "seconds": self.seconds, "done": self.done})


def check_folder(folder: Path) -> None:
    """Raise now, not after the first fit, if the folder cannot be made or written, or has results of something else."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise expected("output", "a folder", f"{str(folder)!r}: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise expected("output", "a folder that may be written", f"{str(folder)!r}: permission denied")
    found = [name for name in RESULTS if (folder / name).exists()]
    if found and not (folder / STATE).is_file():
        raise expected("output", "a folder without results", f"{str(folder)!r} with {' and '.join(found)}")


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


@rank_zero_only
def copy_file(source: Path, to: Path) -> None:
    """Copy a file whole or not at all."""
    with whole(to) as unfinished:
        shutil.copyfile(source, unfinished)


@rank_zero_only
def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """What JSON can hold; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 50 else f"{text[:47]}..."


@rank_zero_only
def say(text: str, show: bool = True) -> None:
    """Print a line of the first process at once."""
    if show:
        print(text, flush=True, file=sys.stdout)
