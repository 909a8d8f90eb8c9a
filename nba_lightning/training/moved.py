"""Which classes of many are worth a search for a backdoor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.pseudo.trigger_families import TriggerFamilies


@torch.no_grad()
def most_moved(
    suspicious: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Tensor],
    number: int,
    generator: torch.Generator | None = None,
    reduce: Reduce = same,
) -> Tensor:
    """All classes, or of many those to which synthetic triggers move the suspicious network most.

    Args:
        suspicious: the suspicious network.
        teacher: a network that has forgotten the backdoor.
        batches: clean images `(B, C, H, W)` in [0, 1].
        number: of the classes that are wanted, at most.
        generator: source of randomness, the same on all processes.
        reduce: averages a tensor over all processes.

    Returns:
        The classes in rising order.
    """
    with evaluating(suspicious, teacher):
        classes = predict(suspicious, batches[0][:1]).shape[1]
        if classes <= number:
            return torch.arange(classes, device=batches[0].device)
        triggers = TriggerFamilies()
        moved = torch.zeros(classes, device=batches[0].device, dtype=torch.float32)
        for images in batches:
            triggered = (images + triggers(images, generator=generator)).clamp(0.0, 1.0).to(images.dtype)
            came, taught = (predict(one, triggered).float().softmax(dim=1) for one in (suspicious, teacher))
            moved += (came - taught).mean(dim=0)
    return reduce(moved).topk(number).indices.sort().values
