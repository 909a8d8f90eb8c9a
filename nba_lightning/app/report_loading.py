"""The lines with which an owner loads the weights that the report is about."""

import json
import keyword
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nba_lightning.app.report_reading import Entry, plain

_FILES = {True: "cleaned.safetensors", False: "rejected.safetensors"}

_EXPECTED = ("size", "mean", "std")


@dataclass(frozen=True)
class Weights:
    """The file, whether it was handed over as cleaned (`None`: nobody says), why not, and how to load it."""

    file: str
    handed_over: bool | None
    reason: str
    next: str
    lines: list[str]
    expects: dict[str, str]


def read_weights(root: Entry, folder: Path) -> Weights:
    """What the report says of the weights; where it says nothing, what the names of the files in the folder say."""
    entry = root.child("weights") or Entry({}, "weights", root.file)
    handed_over = entry.flag("handed_over")
    if handed_over is None:
        there = [state for state, name in _FILES.items() if (folder / name).exists() or entry.text("file") == name]
        handed_over = there[0] if len(there) == 1 else None
    file = entry.text("file") or _FILES[handed_over is not False]
    return Weights(
        file,
        handed_over,
        entry.text("reason") or "",
        entry.text("next") or "",
        loading_lines(file, entry.text("network"), entry.values.get("arguments")),
        {name: plain(entry.values[name]) for name in _EXPECTED if entry.values.get(name) is not None},
    )


def loading_lines(file: str, network: str | None, arguments: Any) -> list[str]:
    """Three lines of Python, and the import of the network where its path is known."""
    lines = ["from safetensors.torch import load_file"]
    made = "network = ...  # as you made it for the suspicious weights"
    if network is not None and all(part.isidentifier() and not keyword.iskeyword(part) for part in network.split(".")):
        module, _, name = network.rpartition(".")
        lines += [f"from {module} import {name}"] if module else []
        made = f"network = {name}({_called_with(arguments)})"
    return [*lines, made, f"network.load_state_dict(load_file({json.dumps(file, ensure_ascii=False)}))"]


def _called_with(arguments: Any) -> str:
    if not isinstance(arguments, Mapping):
        return ""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items() if str(name).isidentifier())
