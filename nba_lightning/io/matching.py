"""Finding a network's weights among a file's tensors: by their names, never by a silent choice."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import expected, first_few

_LESS_THAN_BYTES = 2
"""Numbers of one byte are codes of a quantisation, whatever their dtype says."""
_LIGHTNING_COPIES = ("current_model_state.", "callbacks.")
"""Beside ``state_dict`` of a Lightning checkpoint: the raw weights under an averaging callback, and its averages."""
_CHOOSE = "name one behind a `#`, as in weights='file.pth#{}'."


def match_keys(model: nn.Module, state: Mapping[str, Tensor], under: str | None = None) -> dict[str, Tensor]:
    """Find the network's weights in ``state``, under whatever prefix holds all of its names in its shapes.

    Of several complete copies that are equal to the last bit one is taken. In a Lightning checkpoint the one that the
    ``LightningModule`` calls ``model`` is taken, before its ``teacher`` and what averaging callbacks keep, and a
    warning says so. Everything else is an error that names the copies.

    Args:
        model: the network.
        state: tensors by name, as of :func:`read_state_dict`.
        under: the beginning of the names of the copy to take, up to a dot; empty for names without a prefix.

    Returns:
        The network's own names with their tensors, in the network's dtypes.

    Raises:
        ValueError: if names, shapes or dtypes do not fit, values are not finite, or different copies fit.
    """
    wanted = model.state_dict()
    if not wanted:
        return {}
    known = _prefixes(wanted, state)
    complete = [p for p in known if all(_fits(state.get(p + name), value) for name, value in wanted.items())]
    copies = complete
    if under is not None:
        known, complete = (_under(under, prefixes) for prefixes in (known, complete))
        if not known:
            raise expected("weights", f"a file with a {type(model).__name__} under {under!r}", "no such names")
    prefix = _choose(complete, state, wanted) if complete else (known or [""])[0]
    found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    others = tuple(p[len(prefix) :] for p in copies if p != prefix and p.startswith(prefix))
    surplus = [name for name in found if name not in wanted and not (others and name.startswith(others))]
    _check_names(model, found, surplus, len(state))
    if under is None:
        _tell_of_parts(model, state, prefix, [p for p in known if p not in complete])
    return _converted(wanted, found)


def _prefixes(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What stands before the network's names in the file; what stands before most of them comes first."""
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        counts.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in wanted)
    return sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix), prefix))


def _fits(value: Tensor | None, own: Tensor) -> bool:
    return value is not None and value.shape == own.shape


def _under(under: str, prefixes: Sequence[str]) -> list[str]:
    """The prefixes that begin with ``under``; it alone, if it is one."""
    start = under if under in ("", *prefixes) else under.rstrip(".") + "."
    return [start] if start in prefixes else [prefix for prefix in prefixes if prefix.startswith(start)]


def _choose(complete: Sequence[str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The one prefix to take of those that hold the whole network."""
    first = complete[0]
    if all(_same(state[p + name], state[first + name]) for p in complete[1:] for name in wanted):
        return first
    own = [p for p in complete if not p.startswith(_LIGHTNING_COPIES)]
    own = [p for p in own if not (p == "state_dict.teacher." and "state_dict.model." in own)]
    names = first_few([repr(prefix.rstrip(".")) for prefix in complete])
    if len(own) == 1 and own[0].startswith("state_dict."):
        other = next(prefix for prefix in complete if prefix != own[0])
        warnings.warn(
            f"The file of `weights` holds different copies of the network, under {names}; {own[0].rstrip('.')!r} is "
            f"taken. To take another: {_CHOOSE.format(other.rstrip('.'))}",
            stacklevel=4,
        )
        return own[0]
    raise ValueError(
        f"Expected `weights` to hold one copy of the network, but got different ones under {names}: "
        + _CHOOSE.format(complete[-1].rstrip("."))
    )


def _tell_of_parts(model: nn.Module, state: Mapping[str, Tensor], taken: str, others: Sequence[str]) -> None:
    """Warn of copies of the parameters alone, as averages are often kept: somebody may have wanted them."""
    shapes = {name: value.shape for name, value in model.named_parameters()}
    copies = [
        prefix
        for prefix in others
        if shapes and all(prefix + n in state and state[prefix + n].shape == s for n, s in shapes.items())
    ]
    if copies:
        warnings.warn(
            f"The file of `weights` also holds the parameters without the buffers, under {first_few(map(repr, copies))}"
            f"; those under {taken.rstrip('.')!r} are taken.",
            stacklevel=4,
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _check_names(model: nn.Module, found: Mapping[str, Tensor], surplus: Sequence[str], total: int) -> None:
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in found]
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
            f"Expected `weights` to fit {type(model).__name__}, but got {total} tensors with " + "; ".join(complaints)
        )


def _converted(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The found tensors in the network's dtypes, or an error where that changes what they mean."""
    strange = [f"{n} ({found[n].dtype} for {own.dtype})" for n, own in wanted.items() if _is_strange(found[n], own)]
    if strange:
        raise ValueError(
            f"Expected `weights` to hold plain values of the network's kind, but got quantised or other ones in: "
            f"{first_few(strange)}. Save them from a network that is not quantised."
        )
    result = {name: found[name].to(own.dtype) for name, own in wanted.items()}
    # A network's own buffer may be infinite, as masks of attention are.
    broken = [n for n, own in wanted.items() if not (result[n].isfinite() | (result[n] == own.to("cpu"))).all()]
    if broken:
        raise ValueError(
            f"Expected `weights` to be finite as {_dtypes(wanted)}, but got NaN or infinity in: {first_few(broken)}."
        )
    rounded = [n for n, value in result.items() if not torch.equal(value.to(found[n].dtype), found[n])]
    if rounded:
        warnings.warn(
            f"`weights` are rounded to the network's {_dtypes(wanted)}, in which they are not exact: "
            f"{first_few(rounded)}.",
            stacklevel=4,
        )
    return result


def _is_strange(value: Tensor, own: Tensor) -> bool:
    if own.is_floating_point() or own.is_complex():
        same_kind = value.is_floating_point() == own.is_floating_point() and value.is_complex() == own.is_complex()
        return not same_kind or value.element_size() < _LESS_THAN_BYTES or value.is_meta
    return value.is_meta or not torch.equal(value.to(own.dtype).to(value.dtype), value)


def _dtypes(state: Mapping[str, Tensor]) -> str:
    kinds = {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
    return " and ".join(sorted(kinds))
