"""Files that hold tensors, told apart by their content and read without running code from them."""

import argparse
import pickle
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nba_lightning.core.checks import first_few

_TO_SAVE = "where its author is trusted, and write `torch.save(model.state_dict(), ...)`"
_NUMBER = np.float64(0).__reduce__()[0]  # the function that makes numpy's numbers from bytes; its home was renamed
_HARMLESS: list[Any] = [
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")),
    argparse.Namespace,
]
"""Numbers and names that checkpoints carry beside tensors; making one runs nothing."""
_FOREIGN = {
    b"\x89HDF": "a Keras (HDF5) file, not PyTorch's",
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"BZh": "compressed (bzip2): unpack it first",
    b"\xfd7zXZ": "compressed (xz): unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "a web page or XML, not a download of the file itself",
}

_SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}
"""Of files that hold weights, as a rule."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write into, which becomes it at the end of the block; on any error it is removed.

    So a full disk, or Ctrl-C, leaves what was there before, never half a file.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensor_file(path: Path, name: str = "weights") -> Mapping[str, Any]:
    """Read a PyTorch file (of any age but the tar format) or a safetensors file; the suffix plays no part.

    Args:
        path: the file.
        name: what the argument is called, for the error.

    Returns:
        What it holds: tensors, numbers, text, lists and dictionaries.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is corrupt, of another kind, a folder, no dictionary, or would need unpickling code.
    """
    if path.is_dir():
        raise ValueError(f"Expected `{name}` to be a file, but got the folder {str(path)!r}{_folder_kind(path)}.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected `{name}` to be an existing file, but got {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(32)
    foreign = _foreign_kind(path, start)
    if foreign:
        raise ValueError(f"{str(path)!r} is {foreign}.")
    return _read_safetensors(path) if start[8:9] == b"{" else _read_torch(path, start)


def _folder_kind(path: Path) -> str:
    """What a folder is, and which file of it to name."""
    if (path / ".metadata").is_file():
        command = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        return f", a sharded checkpoint. Write it as one file with `{command}`"
    files = sorted(one.name for one in path.iterdir() if one.suffix in _SUFFIXES)
    return f". Name a file in it: {first_few(files)}" if files else ""


def _foreign_kind(path: Path, start: bytes) -> str | None:
    """What kind of file it is, if it is a known one that cannot be read here."""
    found = next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), None)
    if found is None and start[:1] == b"\x08" and start[2:3] == b"\x12":
        found = "an ONNX model, not PyTorch's weights"
    if found is None and zipfile.is_zipfile(path):
        found = _foreign_zip(path)
    if (
        found is None
        and start[:2] != b"PK"
        and start[:1] != b"\x80"
        and start[8:9] != b"{"
        and tarfile.is_tarfile(path)
    ):
        found = _tar_kind(path)
    return found


def _foreign_zip(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = {entry.rpartition("/")[2] for entry in archive.namelist()}
    if "constants.pkl" in names and "data.pkl" in names:
        return f"a TorchScript program. Load it with `torch.jit.load` {_TO_SAVE}"
    if "archive_format" in names:
        return f"a program of `torch.export`. Load it with `torch.export.load` {_TO_SAVE}"
    if {"config.json", "model.weights.h5"} <= names:
        return "a Keras file, not PyTorch's"
    return None if "data.pkl" in names else "a zip archive that PyTorch did not write: unpack it first"


def _tar_kind(path: Path) -> str:
    with tarfile.open(path) as archive:
        names = archive.getnames()
    if {"pickle", "storages", "tensors"} <= set(names):
        return f"in PyTorch's tar format of before 2017, which cannot be read without running code. Load it {_TO_SAVE}"
    return f"a tar archive of {len(names)} entries: unpack it first and name the weights in it"


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is corrupt or no safetensors file: {error}.") from error


def _read_torch(path: Path, start: bytes) -> Mapping[str, Any]:
    torn = f"{str(path)!r} is truncated, corrupt or no PyTorch or safetensors file"
    if start[:2] != b"PK" and start[:1] != b"\x80":
        raise ValueError(f"{torn}.")
    try:
        # Opened here, since PyTorch goes by the suffix where it is given a path.
        with torch.serialization.safe_globals(_HARMLESS), path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds pickled objects beside tensors, and loading them could run a stranger's code. "
            "Ask its author for `torch.save(model.state_dict(), ...)` or a .safetensors file instead."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{torn}: {error}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected {str(path)!r} to hold a state dict, but got {type(content).__name__}.")
    return content
