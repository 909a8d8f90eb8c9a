"""Loading weights from strangers: tensors only, never code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nba_lightning.core.checks import first_few
from nba_lightning.io.adapters import bare

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
_NESTED = ("state_dict", "model_state_dict", "model", "net", "network")
_PREFERRED_PREFIXES = ("", "model.", "module.", "student.", "model.module.", "module.model.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file without executing anything from it.

    Args:
        path: a `.pt`, `.pth`, `.ckpt` or `.safetensors` file: a state dict, a Lightning checkpoint, or a dictionary
            with a state dict under ``state_dict``, ``model_state_dict``, ``model``, ``net`` or ``network``.

    Returns:
        Names and tensors, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, holds no tensors, has another suffix or would need unpickling code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected `weights` to be an existing file, but got {str(path)!r}.")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"Expected `weights` to end in {', '.join(SUFFIXES)}, but got {str(path)!r}.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for _ in range(2):
        nested = next((content[k] for k in _NESTED if isinstance(content.get(k), Mapping)), None)
        if nested is None:
            break
        content = nested
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"Expected {str(path)!r} to hold a state dict, but found no tensors; "
            f"its keys are {first_few(map(str, content))}."
        )
    return tensors


def read_attack_state(path: str | Path) -> dict[str, Tensor]:
    """Read an attack's state from a Lightning checkpoint of its training, or from a state dict of its own.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, would need unpickling code, or holds no attack.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected `state` to be an existing file, but got {str(path)!r}.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    parts = [part for part in content.values() if isinstance(part, Mapping) and isinstance(part.get("attack"), Mapping)]
    found = parts[0]["attack"] if parts else content
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or "_extra_state" not in tensors:
        raise ValueError(
            f"Expected {str(path)!r} to hold an attack, as checkpoints of a training on poisoned images do; "
            f"its keys are {first_few(map(str, content))}."
        )
    return tensors


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is corrupt or no safetensors file: {error}.") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.stat().st_size == 0 or not _looks_like_torch_file(path):
            raise ValueError(f"{str(path)!r} is truncated, corrupt or no PyTorch file.") from error
        raise ValueError(
            f"{str(path)!r} holds pickled objects beside tensors, and loading them could run a stranger's code. "
            "Ask its author for `torch.save(model.state_dict(), ...)` or a .safetensors file instead."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is truncated, corrupt or no PyTorch file: {error}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected {str(path)!r} to hold a state dict, but got {type(content).__name__}.")
    return content


def _looks_like_torch_file(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    return zipfile.is_zipfile(path) or start[:1] == b"\x80"


def match_keys(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the network's weights in ``state``, under a common prefix such as ``model.`` or ``module.``.

    Raises:
        ValueError: if names or shapes do not fit; the message lists the first few.
    """
    wanted = model.state_dict()
    if not wanted:
        return {}
    anchor = next(iter(wanted))
    prefixes = {name[: -len(anchor)] for name in state if name.endswith(anchor)}
    prefixes = {prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")}
    ranked = sorted(prefixes, key=lambda p: (_PREFERRED_PREFIXES.index(p) if p in _PREFERRED_PREFIXES else 99, len(p)))
    complete = [prefix for prefix in ranked if all(prefix + name in state for name in wanted)]
    prefix = (complete or ranked or [""])[0]
    found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    complaints = [
        f"{what}: {first_few(names)}"
        for what, names in (("missing", missing), ("unexpected", surplus), ("wrong shape", wrong))
        if names
    ]
    if complaints:
        raise ValueError(
            f"Expected `weights` to fit {type(model).__name__}, but got {len(state)} tensors with "
            + "; ".join(complaints)
        )
    return {name: found[name] for name in wanted}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights in ``path`` into ``model``, in place. See :func:`read_state_dict` and :func:`match_keys`."""
    network = bare(model)
    network.load_state_dict(match_keys(network, read_state_dict(path)))


def save_weights(
    state: Mapping[str, Tensor], path: str | Path, dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write a state dict as `.safetensors`.

    Args:
        state: names and tensors; tensors that share memory are written twice.
        path: the file; its folder is made.
        dtypes: the dtype to store each tensor in; ``None`` keeps all.
    """
    dtypes = dtypes or {}
    tensors = {
        name: value.detach().to("cpu", dtypes.get(name, value.dtype)).clone().contiguous()
        for name, value in state.items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
