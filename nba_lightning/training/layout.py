"""The order in which weights lie in memory, and numbers that a device computes faster with."""

from collections.abc import Iterable

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.core.randomness import generator_for

_HALF = ("16-mixed", "16-true", "bf16-mixed", "bf16-true")
_CLOSE = 1e-3
"""How far answers may differ, in shares of their size, since sums are taken in another order."""


def prefers_channels_last(device: torch.device, precision: str) -> bool:
    """Whether convolutions are faster with channels-last weights: oneDNN's on the CPU, a GPU's in half precision.

    A rule and no timing, so that a fit that is repeated or resumed computes in the same order.

    Args:
        device: where it trains.
        precision: the Trainer's.
    """
    if device.type == "cpu":
        available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return available and precision in ("32-true", *_HALF)
    return device.type == "cuda" and precision in _HALF


def arrange(
    networks: Iterable[nn.Module],
    device: torch.device,
    precision: str,
    image_shape: tuple[int, int, int] | None,
    tell: bool = True,
) -> list[nn.Module]:
    """Bring networks into channels-last order where that is faster, and their forward pass bears it.

    Some do not: ``features.view(len(features), -1)`` needs the other order. So images are passed through both.

    Args:
        networks: any networks.
        device: where they will be.
        precision: the Trainer's.
        image_shape: `(C, H, W)` of the images; where it is not known nothing is changed.
        tell: whether it is said.

    Returns:
        The networks that were brought into that order by this call.
    """
    if image_shape is None or not prefers_channels_last(device, precision):
        return []
    changed = [network for network in networks if _bears(network, image_shape)]
    if changed and tell:
        rank_zero_info(
            f"Weights of convolutions are in channels-last order for this fit, which is faster on this {device.type} "
            "(`channels_last` true or false decides otherwise)."
        )
    return changed


def restore(networks: Iterable[nn.Module]) -> None:
    """Bring networks back into the usual order."""
    for network in networks:
        network.to(memory_format=torch.contiguous_format)


def _bears(network: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Bring a network into channels-last order, but only if it answers as before; whether that was done."""
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not weights or not all(weight.is_contiguous() for weight in weights):
        return False  # nothing to gain, or somebody has chosen an order
    images = torch.rand((2, *image_shape), generator=generator_for(0)).to(weights[0])
    with torch.no_grad(), evaluating(network):
        try:
            wanted = predict(network, images)
            network.to(memory_format=torch.channels_last)
            found = predict(network, images)
            if bool(((found - wanted).abs() <= _CLOSE * (1 + wanted.abs())).all()):
                return True
        except RuntimeError:
            pass
    network.to(memory_format=torch.contiguous_format)
    return False


def advise_half_precision(device: torch.device, precision: str) -> None:
    """Say where bf16 would be faster; nothing is changed, since it changes figures."""
    if precision != "32-true":
        return
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    if faster:
        rank_zero_info(
            f"This {device.type} multiplies bf16 in hardware: with the Trainer's `precision` bf16-mixed, large "
            "convolutional networks train up to three times as fast, in slightly other figures."
        )
