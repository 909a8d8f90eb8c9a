"""Modes of networks: evaluating, frozen, and BatchNorm that must not remember."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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
