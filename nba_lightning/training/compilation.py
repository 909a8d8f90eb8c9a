"""Compiling a network in regions, so that hooks on observed layers go on working."""

from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo import OptimizedModule

from nba_lightning.core.checks import expected

_OWN = "_forward_before_compilation"
"""Kept in a compiled module's dictionary: the ``forward`` that a user had put on the instance, or ``None``."""


def regions(network: nn.Module, observed: Sequence[str]) -> list[nn.Module]:
    """The largest submodules that hold no observed layer strictly inside.

    A hook on a region's own output runs outside of what is compiled. A hook inside would be traced once and then be
    there, or not, for good: ``torch.compile`` does not look again.

    Args:
        network: any network.
        observed: module paths of the layers with hooks.

    Returns:
        Submodules with parameters; the network itself where nothing is observed.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module, path: str) -> None:
        if any(name.startswith(path) and name != path.rstrip(".") for name in observed):
            for name, child in module.named_children():
                visit(child, f"{path}{name}.")
        elif any(True for _ in module.parameters()):
            found.append(module)

    visit(network, "")
    return found


def compile_regions(network: nn.Module, observed: Sequence[str], backend: str | None = None) -> None:
    """Compile ``network`` in place, region by region; :func:`undo_compile` takes it back.

    Args:
        network: any network; its parameters, keys and hooks stay as they are.
        observed: module paths of the layers with hooks.
        backend: of :func:`torch.compile`; ``None`` is its default.

    Raises:
        ValueError: if the network, or a part of it, is compiled already.
    """
    check_not_compiled(network)
    options: dict[str, Any] = {} if backend is None else {"backend": backend}
    # All blocks of a network share one function, and its variants (shapes, modes, networks) one limit, of 8 by default.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(256, getattr(torch._dynamo.config, limit)))
    undo_compile(network)  # of a fit that broke off
    for region in regions(network, observed):
        own = vars(region).get("forward")
        region.forward = torch.compile(region.forward, **options)
        vars(region)[_OWN] = own


def check_not_compiled(network: nn.Module, name: str = "model") -> None:
    """Raise if the network, or a part of it, went through :func:`torch.compile`, where hooks go unseen.

    Raises:
        ValueError: with the part and the way out.
    """
    for path, module in network.named_modules():
        if isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None:
            raise expected(
                name,
                "a network that is not compiled yet",
                f"one with {path or 'all of it'!r} compiled. Give the network itself (`_orig_mod` of what "
                "`torch.compile` returned) and set `compile` here, which compiles around the observed layers",
            )


def undo_compile(network: nn.Module) -> None:
    """Take :func:`compile_regions` back, so that copies of the network do not call the original's code."""
    for module in network.modules():
        if _OWN in vars(module):
            own = vars(module).pop(_OWN)
            del module.forward
            if own is not None:
                module.forward = own
