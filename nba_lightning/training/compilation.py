"""Compiling a network in regions, so that hooks on observed layers go on working."""

from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn


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
    """
    options: dict[str, Any] = {} if backend is None else {"backend": backend}
    # All blocks of a network share one function, and its variants (shapes, modes, networks) one limit, of 8 by default.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(256, getattr(torch._dynamo.config, limit)))
    undo_compile(network)  # of a fit that broke off
    for region in regions(network, observed):
        region.forward = torch.compile(region.forward, **options)


def undo_compile(network: nn.Module) -> None:
    """Take :func:`compile_regions` back, so that copies of the network do not call the original's code."""
    for module in network.modules():
        module.__dict__.pop("forward", None)
