"""Which layers of a network to observe: names that a user gives, or a default for any network."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nba_lightning.core.checks import expected, first_few

_MOST = 0.5
"""Share of a network's layers with parameters that its blocks hold."""


_STAGES = 6
"""A timm network with more stages than this numbers its blocks."""


def layer_names(model: nn.Module) -> list[str]:
    """Names of all layers of ``model`` whose features can be captured, as module paths."""
    return [name for name, _ in model.named_modules() if name]


def resolve_layers(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Check layer names, or take the network's own default.

    Args:
        model: any network.
        layers: module paths such as ``["layer2", "layer3.1"]``; ``None`` takes :func:`default_layers`.

    Returns:
        The names.

    Raises:
        ValueError: if a name is unknown or there is no default; the message lists the available names.
    """
    available = layer_names(model)
    if layers is None:
        layers = default_layers(model)
        if layers is None:
            raise ValueError(
                f"Expected `layers` to name the layers to observe, since {type(model).__name__} has no default, "
                f"but got None. Available: {first_few(available, 40)}."
            )
    if not layers:
        raise ValueError(
            f"Expected `layers` to name at least one layer, but got none. Available: {first_few(available, 40)}."
        )
    unknown = [name for name in layers if name not in available]
    if unknown:
        raise ValueError(
            f"Expected `layers` to be names of layers of {type(model).__name__}, but got {first_few(unknown)}. "
            f"Available: {first_few(available, 40)}."
        )
    return list(layers)


def default_layers(model: nn.Module) -> list[str] | None:
    """Three layers of rising depth of any network, as module paths; ``None`` where it has no blocks.

    These are the network's own ``feature_layers`` (all of :mod:`nba_lightning.networks` have them), or the last three
    stages of a timm network's ``feature_info``, or else the blocks at each third of the deepest chain that holds most
    of the layers: the stages of a residual network, the blocks of a transformer.
    """
    own: Sequence[str] | None = getattr(model, "feature_layers", None)
    if own is not None:
        return list(own)
    paths = {name for name, _ in model.named_modules()}
    known = [info["module"] for info in getattr(model, "feature_info", None) or [] if isinstance(info, dict)]
    if known and all(name in paths for name in known):
        return known[-3:] if len(known) <= _STAGES else _thirds(known)
    inner = getattr(model, "network", None)  # a wrapper of ours
    if isinstance(inner, nn.Module) and len(list(model.children())) == 1:
        found = default_layers(inner)
        return None if found is None else [f"network.{name}" for name in found]
    blocks = _chain(model)
    return _thirds(blocks) if blocks else None


def _thirds(blocks: Sequence[str]) -> list[str]:
    return [blocks[(third * len(blocks)) // 3 - 1] for third in (1, 2, 3)]


def _chain(model: nn.Module) -> list[str]:
    """Module paths of the blocks of the deepest module whose three or more blocks hold most of the layers."""
    total, found = _size(model), list[str]()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        blocks = [name for name, child in module.named_children() if _size(child) and _is_block(module, child)]
        held = sum(_size(module.get_submodule(name)) for name in blocks)
        if len(blocks) >= 3 and held > _MOST * total:
            found = [prefix + name for name in blocks]
    return found


def _is_block(parent: nn.Module, child: nn.Module) -> bool:
    """Something that has layers itself, or a layer of a plain chain."""
    return len(list(child.children())) > 0 or isinstance(parent, nn.Sequential)


def _size(module: nn.Module) -> int:
    """Layers with parameters of their own."""
    return sum(1 for layer in module.modules() if any(True for _ in layer.parameters(recurse=False)))


def affine_norms(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers that have weights, whose channels stand for neurons.

    Raises:
        ValueError: if there is none.
    """
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.affine]
    if not norms:
        raise expected("model", "a network with BatchNorm layers that have weights", type(model).__name__)
    return norms
