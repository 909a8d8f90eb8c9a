"""The format of an attack's state: tensors, and beside them as bytes whose they are and under which arguments made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nba_lightning.core.checks import expected, first_few
from nba_lightning.io.files import read_tensor_file

_KEY = "_extra_state"
"""Where PyTorch keeps what :meth:`torch.nn.Module.get_extra_state` gives."""


def pack(attack: str, ready: bool, arguments: Mapping[str, Any]) -> Tensor:
    """Class name, readiness and plain arguments as JSON bytes `(N,)`, uint8, so that a state is tensors only."""
    text = json.dumps({"attack": attack, "ready": ready, "arguments": dict(arguments)}, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def unpack(tag: Tensor) -> dict[str, Any]:
    """What :func:`pack` wrote; of a state from before arguments were stored, ``arguments`` is ``None``."""
    text = bytes(tag.tolist()).decode()
    if text.startswith("{"):
        found: dict[str, Any] = json.loads(text)
        return found
    name, _, ready = text.partition(":")
    return {"attack": name, "ready": ready == "1", "arguments": None}


def attack_name(state: Mapping[str, Tensor]) -> str:
    """The class name of the attack whose state this is."""
    return str(unpack(state[_KEY])["attack"]) if _KEY in state else "stranger"


def different_arguments(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> list[str] | None:
    """Which arguments differ from those of the state, each as ``name=theirs instead of ours``.

    Args:
        state: an attack's state, with its tag.
        arguments: plain values by name.

    Returns:
        The differences; ``None`` if the state does not know its arguments.
    """
    saved = unpack(state[_KEY])["arguments"]
    if saved is None:
        return None
    ours = json.loads(json.dumps(dict(arguments)))  # tuples become lists, as they do in the file
    names = sorted(saved.keys() | ours.keys())
    return [
        f"{name}={saved.get(name, '(none)')!r} instead of {ours.get(name, '(none)')!r}"
        for name in names
        if name not in saved or name not in ours or saved[name] != ours[name]
    ]


def read_attack_state(path: str | Path) -> dict[str, Tensor]:
    """Read an attack's state from a Lightning checkpoint of its training, or from a state dict of its own.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, would need unpickling code, or holds no attack or several.
    """
    content = read_tensor_file(Path(path), "state")
    parts = [part for part in content.values() if isinstance(part, Mapping) and isinstance(part.get("attack"), Mapping)]
    if len(parts) > 1:
        raise expected("state", "a file with one attack", f"{str(path)!r} with {len(parts)}")
    found = parts[0]["attack"] if parts else content
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if _KEY not in tensors:
        raise ValueError(
            f"Expected {str(path)!r} to hold an attack, as checkpoints of a training on poisoned images do; "
            f"its keys are {first_few(map(str, content))}."
        )
    return tensors
