"""Argument checks with one phrasing of errors."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor


def expected(name: str, what: str, got: Any) -> ValueError:
    """Build the error that names the argument, what was expected and what came."""
    return ValueError(f"Expected `{name}` to be {what}, but got {got}.")


def check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise if ``value`` lies outside the interval from ``low`` to ``high``."""
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise expected(name, f"in {interval}", value)


def check_at_least(name: str, value: float, low: float) -> None:
    """Raise if ``value`` is smaller than ``low``."""
    if not value >= low:
        raise expected(name, f"at least {low:g}", value)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise if ``value`` is none of ``choices``."""
    if value not in choices:
        raise expected(name, f"one of {', '.join(sorted(choices))}", repr(value))


def check_image_batch(name: str, images: Tensor) -> None:
    """Raise unless ``images`` is a floating-point tensor of shape `(B, C, H, W)`. Values are not read (no sync)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise expected(
            name, "a floating-point tensor of shape (B, C, H, W)", f"{images.dtype} of shape {tuple(images.shape)}"
        )


def check_unit_range(name: str, images: Tensor) -> None:
    """Raise unless all values lie in [0, 1]. Reads the values, so it waits for the device: not for a hot path."""
    check_image_batch(name, images)
    low, high = (float(bound) for bound in torch.aminmax(images.detach().float()))
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"Expected `{name}` to hold values in [0, 1], but got NaN.")
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"Expected `{name}` to hold values in [0, 1], but got values from {low:.4g} to {high:.4g}. If the loader "
            "normalises its images, say so: `Normalized(network, mean, std, loaders_normalize=True)`."
        )


def check_labels(name: str, labels: Tensor, num_classes: int | None = None, allow_padding: bool = False) -> None:
    """Raise unless ``labels`` are class numbers `(B,)`, from 0 to K - 1. Reads the values: not for a hot path.

    Args:
        name: of the argument.
        labels: what should be class numbers.
        num_classes: number of classes K, if known.
        allow_padding: whether -1 may mark padding.

    Raises:
        ValueError: for other shapes and types (float, one-hot), negative numbers and numbers above K - 1.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise expected(
            name,
            "class numbers, integers of shape (B,)",
            f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}",
        )
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < (-1 if allow_padding else 0) or (num_classes is not None and high >= num_classes):
        classes = "at least 0" if num_classes is None else f"classes 0 to {num_classes - 1} of the network"
        raise expected(name, classes, f"{low if low < 0 else high}")


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """Join the first names for an error message and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, text, lists and dictionaries alone, so that it needs no code to be read."""
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
