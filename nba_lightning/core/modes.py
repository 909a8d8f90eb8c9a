"""Modes of networks: frozen, evaluating, training, and BatchNorm that must not remember."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nba_lightning.core.checks import first_few


class Frozen(nn.Module):
    """A copy of a network that never changes: in ``eval`` mode for good, without gradients for its parameters.

    It follows its owner to devices and precisions, and is no part of the owner's parameters and state: the optimiser,
    DDP, averaging callbacks and checkpoints do not see it. Gradients with respect to its input flow as usual.

    Args:
        network: any network; it is copied and stays as it is.

    Example:
        >>> frozen = Frozen(nn.Linear(2, 2))
        >>> frozen.train().network.training, len(list(frozen.parameters())), len(frozen.state_dict())
        (False, 0, 0)
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._inner = (copy.deepcopy(network).requires_grad_(False).eval(),)  # in a tuple: no submodule
        self._fingerprint: str | None = None

    @property
    def network(self) -> nn.Module:
        """The copy."""
        return self._inner[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy gives."""
        return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> "Frozen":
        """Nothing changes."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def fingerprint(self) -> str:
        """A hash of all weights, so that a fit can tell whether it goes on with the same network."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.network)
        return self._fingerprint


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's state, in float32 where it is floating-point."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        plain = value.detach().cpu()
        found.update(name.encode())
        found.update((plain.float() if plain.is_floating_point() else plain).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class evaluating:  # noqa: N801
    """Context in which networks are in ``eval`` mode; each layer gets its own mode back behind it."""

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for network in self.networks for module in network.modules()]
        for network in self.networks:
            network.eval()

    def __exit__(self, *exception: object) -> None:
        for module, training in self.modes:
            module.training = training


@contextmanager
def placed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which a network is on a device; it goes back behind it to where its first parameter was."""
    home = next((parameter.device for parameter in network.parameters()), device)
    network.to(device)
    try:
        yield
    finally:
        network.to(home)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Context in which BatchNorm normalises by the batch, if in training, but does not learn statistics from it."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def begin_training(network: nn.Module, tell_modes: bool = True) -> list[str]:
    """Bring a network into ``train`` mode and say what of it does not train.

    A network that arrives in ``eval`` mode as a whole was loaded or tested before, so all of it goes into ``train``
    mode. Layers in ``eval`` mode within a network in ``train`` mode, and parameters that require no gradients, are
    their owner's wish: they stay.

    Args:
        network: the network.
        tell_modes: whether modes are worth telling.

    Returns:
        What there is to tell, one sentence each.
    """
    told: list[str] = []
    if not network.training:
        network.train()
        if tell_modes:
            told.append("The network came in eval mode, as a loaded or tested one does; it trains in train mode.")
    differs = (_BatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    resting = [name for name, layer in network.named_modules() if isinstance(layer, differs) and not layer.training]
    if resting and tell_modes:
        told.append(f"These layers came in eval mode and stay in it: {first_few(resting)}.")
    fixed = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    if fixed:
        told.append(f"These parameters came with `requires_grad=False` and do not train: {first_few(fixed)}.")
    return told


def check_finite(network: nn.Module, name: str) -> None:
    """Raise if a parameter or buffer holds NaN or infinity; reads all values once.

    Raises:
        ValueError: with the names of the first of them.
    """
    state = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ValueError(f"Expected `{name}` to have finite weights, but got NaN or infinity in {first_few(broken)}.")
