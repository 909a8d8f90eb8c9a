"""Reading a network's weights from strangers' files, and writing them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nba_lightning.core.checks import first_few
from nba_lightning.io.adapters import bare
from nba_lightning.io.files import read_tensor_file, whole
from nba_lightning.io.matching import match_keys


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file without executing anything from it.

    Args:
        path: a file of PyTorch or safetensors, told by its content: a state dict, a Lightning checkpoint, or any
            dictionaries with state dicts in them.

    Returns:
        Tensors on the CPU, by names joined with dots: ``state_dict.model.conv.weight``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, of another kind, holds no tensors or would need unpickling code.
    """
    content = read_tensor_file(Path(path))
    tensors = dict(_flatten(content))
    if not tensors:
        raise ValueError(
            f"Expected {str(path)!r} to hold a state dict, but found no tensors; "
            f"its keys are {first_few(map(str, content))}."
        )
    return tensors


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load what :func:`~nba_lightning.io.matching.match_keys` finds in ``path`` into ``model``, in place.

    Args:
        model: the network.
        path: the file; where it holds several copies of the network, the beginning of the names of one of them behind
            a ``#``: ``checkpoint.pth#model_ema``, ``two.pth#state_dict.encoder_q``, or ``w.pth#`` for no prefix.
    """
    network, (file, under) = bare(model), split_location(path)
    network.load_state_dict(match_keys(network, read_state_dict(file), under))


def split_location(path: str | Path) -> tuple[Path, str | None]:
    """File and name behind the last ``#``; a file whose own name has a ``#`` is taken as it is."""
    file, mark, under = str(path).rpartition("#")
    return (Path(path), None) if not mark or Path(path).is_file() else (Path(file), under)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict; of one that is sharded over processes, which all must ask, the first one gets it.

    Args:
        network: any network, sharded by FSDP2 or not.

    Returns:
        Names and whole tensors; of a sharded network on the CPU, and nothing on the other processes.
    """
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return network.state_dict()
    # Imported here, since it takes long and few need it.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(network, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def save_weights(
    state: Mapping[str, Tensor], path: str | Path, dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write a state dict as `.safetensors`.

    Args:
        state: names and tensors; tensors that share memory are written twice.
        path: the file; its folder is made. A full disk leaves what was there before.
        dtypes: the dtype to store each tensor in; ``None`` keeps all.
    """
    dtypes = dtypes or {}
    tensors = {
        name: value.detach().to("cpu", dtypes.get(name, value.dtype)).clone().contiguous()
        for name, value in state.items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(Path(path)) as unfinished:
        unfinished.write_bytes(save(tensors))  # `save_file` makes a file that its owner alone may read
