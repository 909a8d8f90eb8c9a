"""An owner's network from its name: a class or function on the path, its arguments, its weights, its normalisation."""

import inspect
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from nba_lightning.core.checks import expected, is_plain
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.io.adapters import Normalized, bare
from nba_lightning.io.files import read_tensor_file
from nba_lightning.io.weights import load_weights, split_location


def load_network(
    network: str,
    weights: str | None,
    arguments: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Normalized:
    """Make a network by its name and load its weights.

    Args:
        network: import path of a class or function: ``torchvision.models.resnet18``, ``timm.create_model``,
            ``transformers.ViTForImageClassification`` (its arguments are those of its configuration), a
            ``LightningModule``, or the owner's own module in the working folder or on the path.
        weights: file with its weights; ``None`` for what the call gives (``--network.pretrained true``).
        arguments: keyword arguments of the call. Those of a ``LightningModule`` are in its checkpoint too.
        mean: of the normalisation that it was trained with, one value for each channel.
        std: likewise.

    Raises:
        ValueError: if the name leads to nothing, the call fails, gives no network, weights do not fit, or the
            normalisation is missing.
    """
    if mean is None or std is None:
        raise expected(
            "mean",
            "given with `std`: the normalisation with which the network was trained, one value for each channel "
            "(`--mean '[0]' --std '[1]'` for a network that takes images in [0, 1]), which nobody can guess",
            "None",
        )
    make, given = _resolve(network), dict(arguments or {})
    if inspect.isclass(make) and issubclass(make, pl.LightningModule) and weights is not None:
        given = _hyperparameters(weights) | given
    found = _call(make, network, given)
    if weights is not None:
        load_weights(found, weights)
    return Normalized(found, mean, std)


def _resolve(name: str) -> Any:
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise expected(
            "network",
            "the import path of a class or function, such as torchvision.models.resnet18 or, of a file mine.py in the "
            "working folder, mine.Network",
            f"{name!r} ({error})",
        ) from error


def _call(make: Any, name: str, arguments: dict[str, Any]) -> nn.Module:
    if not callable(make):
        raise expected("network", "the import path of a class or function", f"{name!r}, {type(make).__name__}")
    try:
        config = getattr(make, "config_class", None)  # as the models of transformers have
        if inspect.isclass(make) and config is not None:
            file = arguments.pop("config", None)
            arguments = {"config": config(**arguments) if file is None else config.from_json_file(file)}
        found = make(**arguments)
    except (TypeError, ValueError, RuntimeError, OSError, AssertionError, KeyError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise expected(
            "network", "callable with the arguments `--network.NAME VALUE`", f"{name}({shown}): {error}"
        ) from error
    if not isinstance(found, nn.Module):
        raise expected("network", "a class or function that gives an nn.Module", f"{type(found).__name__} of {name}")
    return found


def _hyperparameters(weights: str) -> dict[str, Any]:
    """The plain arguments that a Lightning checkpoint keeps."""
    content = read_tensor_file(split_location(weights)[0])
    saved = content.get("hyper_parameters", {})
    if not isinstance(saved, Mapping):
        return {}
    return {str(key): value for key, value in saved.items() if is_plain(value) and not str(key).startswith("_")}


@torch.no_grad()
def count_classes(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """The number of classes K of a network, asked with an empty image.

    Raises:
        ValueError: if it does not take images of that shape, with what to try, or gives no logits.
    """
    weight = next(network.parameters(), torch.zeros(()))
    probe = torch.zeros((2, *image_shape), device=weight.device, dtype=weight.dtype)
    try:
        with evaluating(network):
            logits = predict(network, probe)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise expected(
            "image_size",
            f"the height and width that {type(bare(network)).__name__} takes (and `channels` 1 or 3)",
            f"images of shape {image_shape}, with which it fails: {str(error).splitlines()[0]}",
        ) from error
    if logits.ndim != 2 or len(logits) != 2:
        raise expected("network", "one that gives logits (B, K)", f"shape {tuple(logits.shape)} for 2 images")
    return logits.shape[1]
