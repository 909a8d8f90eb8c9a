"""The last linear layer of a network: the one whose output is the logits, whatever it is called."""

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import expected, first_few
from nba_lightning.core.features import capture, predict
from nba_lightning.core.modes import evaluating


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by module path, in the order in which they were registered."""
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, nn.Linear)}


def check_head(network: nn.Module, head: str | None, argument: str = "network") -> None:
    """What can be said without an image: there are linear layers, and ``head`` names one of them if it is given.

    Raises:
        ValueError: if not.
    """
    layers = linear_layers(network)
    if head is not None and head not in layers:
        raise expected("head", "the path of a linear layer", f"{head!r}. There are: {first_few(layers, 20)}")
    if not layers:
        raise expected(argument, "a network with a linear layer", type(network).__name__)


@torch.no_grad()
def find_head(network: nn.Module, images: Tensor, head: str | None = None, argument: str = "network") -> str:
    """Module path of the linear layer whose output is the network's, as one pass in ``eval`` mode shows.

    Args:
        network: any network; compiled ones do not show their layers' outputs.
        images: `(B, C, H, W)` as the network takes them; two will do.
        head: the path, if it is known; it is checked.
        argument: what the network is called in errors.

    Raises:
        ValueError: if there is none, or the named one is not.
    """
    names = [path for path in linear_layers(network) if path]
    if head is not None:
        check_head(network, head, argument)
        names = [head]
    if isinstance(network, nn.Linear):
        return ""
    with evaluating(network), capture(network, names) as outputs:
        logits = predict(network, images)
    for path in reversed(names):
        output = outputs.get(path)  # a layer may be there and never be called
        if output is not None and output.shape == logits.shape and torch.allclose(output.float(), logits.float()):
            return path
    if head is not None:
        raise expected("head", "the linear layer whose output is the network's", repr(head))
    got = f"{type(network).__name__}, whose output is not that of {first_few(names, 20) or 'any linear layer'}"
    raise expected(argument, "one that ends in a linear layer", got)
