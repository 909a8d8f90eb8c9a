"""Features of named layers, captured by forward hooks in one forward pass, without surgery on the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_OVERWRITTEN: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()
"""Whether what follows a layer writes into its output in place, as passes in `eval` and training mode showed."""


def logits_of(output: Any) -> Tensor:
    """Logits `(B, K)` from what a network returned: a tensor, an object with ``.logits``, or a mapping with it.

    Raises:
        TypeError: if there are none, or several things whose order does not tell which they are.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        several = isinstance(output, tuple | list)
        advice = " Say which part they are: `nba_lightning.io.adapters.Output(network, which)`." if several else ""
        got = f"a {type(output).__name__} of {len(output)} parts" if several else f"{type(output).__name__}"
        raise TypeError(f"Expected the network to return logits or an object with `.logits`, but got {got}.{advice}")
    return found


def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Logits `(B, K)` of any image classifier, for images `(B, C, H, W)` in [0, 1]."""
    return logits_of(network(images))


class Captured(dict[str, Tensor]):
    """Features by layer name; a layer that the forward pass left out is named where it is asked for."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f"Expected `layers` to name layers that the network's forward pass calls, but got {name!r}, which it skips."
        )


@contextmanager
def capture(model: nn.Module, layers: Sequence[str]) -> Iterator[Captured]:
    """Collect the outputs of ``layers`` in every forward pass within the ``with`` block; hooks are gone after it.

    Of a layer that is called several times in one pass the last output is kept. The first pass copies each output and
    looks whether an in-place layer behind it (``nn.ReLU(inplace=True)``, ``+=``) changes it; only then do further
    passes copy.

    Raises:
        ValueError: on access to a layer that the forward pass skipped.
        RuntimeError: if an output is changed in place in this pass, but was not in earlier ones.
    """
    captured = Captured()
    watched: dict[str, tuple[nn.Module, Tensor, int | None]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = _tensor_of(output)
            version = None if found.is_inference() else found._version  # inference tensors have none
            safe = version is not None and _OVERWRITTEN.get(module, {}).get(module.training) is False
            captured[name] = found if safe else found.clone()
            watched[name] = (module, found, version)

        return hook

    def look(*_: Any) -> None:
        for name, (module, found, version) in watched.items():
            if version is not None:
                _note(name, module, found._version != version, captured[name] is found)
        watched.clear()

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    if layers:
        handles.append(model.register_forward_hook(look))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _note(name: str, module: nn.Module, overwritten: bool, shared: bool) -> None:
    """Remember whether a layer's output was written into; in the mode that the layer is in."""
    known = _OVERWRITTEN.setdefault(module, {})
    known[module.training] = overwritten or known.get(module.training, False)
    if overwritten and shared:
        raise RuntimeError(
            f"The features of layer {name!r} were changed in place by a layer behind it, which earlier passes did not "
            "do. They will be copied from now on: run this pass again."
        )


def _tensor_of(output: Any) -> Tensor:
    """The features in what a layer returned: itself, the first of several, or the first value of a mapping."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def features(model: nn.Module, images: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and features of one forward pass.

    Args:
        model: a network from images to logits.
        images: `(B, C, H, W)`, float, values in [0, 1].
        layers: module paths, as checked by :func:`resolve_layers`; empty captures nothing.

    Returns:
        The logits `(B, K)` and a dictionary from layer name to features, in the order of ``layers``.

    Raises:
        ValueError: if the forward pass skips one of the layers.
    """
    with capture(model, layers) as captured:
        logits = predict(model, images)
    return logits, {name: captured[name] for name in layers}


@contextmanager
def changed(model: nn.Module, layer: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the features of one layer in every forward pass within the ``with`` block.

    Args:
        model: a network.
        layer: module path.
        change: from the layer's output (the first of several) to what layers behind it get; out of place.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        found = change(_tensor_of(output))
        if isinstance(output, Mapping):
            return type(output)(**{**output, next(iter(output)): found})
        return type(output)([found, *output[1:]]) if isinstance(output, tuple | list) else found

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
