"""Modules of a public code base, imported from the folder of its clone and from nowhere else."""

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

from common import Noise
from PIL import Image
from torch import arange
from torch.utils.data import Dataset

UNNEEDED = ("cv2", "imageio", "kornia", "pandas", "pytorch_wavelets")
"""What the clones import and what is timed does not use: an empty stand-in takes its place where it is missing."""


class Clone(NamedTuple):
    """A code base: the flag that names its folder, its address, and the modules that are imported."""

    flag: str
    address: str
    modules: Sequence[str]


class Imported:
    """Modules of a clone, by the last part of their names."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = {name.rpartition(".")[2]: module for name, module in modules.items()}

    def __getattr__(self, name: str) -> Any:
        return self._modules[name]


def load(clone: Clone, folder: Path) -> Imported:
    """Import a clone's modules, and leave ``sys.path`` and ``sys.modules`` as they were.

    Two clones may have modules of one name, such as ``utils``; neither is found by anybody else.

    Raises:
        SystemExit: for a folder that is not there, is no such clone, or whose code cannot be imported.
    """
    wanted = f"Expected `{clone.flag}` to be the folder of a clone of {clone.address}, but"
    if not folder.is_dir():
        raise SystemExit(f"{wanted} {folder} is no folder.")
    for name in clone.modules:
        if not (folder / f"{name.replace('.', '/')}.py").is_file():
            raise SystemExit(f"{wanted} {folder} has no {name.replace('.', '/')}.py.")
    theirs = {path.stem for path in folder.iterdir()}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in theirs}
    stand_ins = {name: MagicMock() for name in UNNEEDED if name not in sys.modules and find_spec(name) is None}
    importlib.invalidate_caches()
    with (
        patch.object(sys, "path", [str(folder.resolve()), *sys.path]),
        patch.object(sys, "dont_write_bytecode", new=True),
    ):
        sys.modules.update(stand_ins)
        try:
            return Imported({name: importlib.import_module(name) for name in clone.modules})
        except Exception as error:  # their code, which may be of another version or want another package
            raise SystemExit(f"{wanted} importing it fails: {type(error).__name__}: {error}") from None
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in theirs | set(stand_ins)]:
                del sys.modules[name]
            sys.modules.update(hidden)


class Pictures(Dataset[tuple[Image.Image, int]]):
    """What both code bases read: torchvision's CIFAR10 without a transform, an array that becomes a PIL image."""

    def __init__(self, source: Noise) -> None:
        pixels = source.images.read(arange(len(source.images)))
        self.data, self.targets = pixels.permute(0, 2, 3, 1).numpy().copy(), source.images.labels.tolist()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), self.targets[index]
