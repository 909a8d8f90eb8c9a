"""Networks in the plane of a teacher, the student that started from it and the suspicious network."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
Place = tuple[float, float]
"""How far from the teacher towards the student, and how far towards the suspicious network; in sum at most 1."""
OVER, DIRECT, HALFWAY = "over the student", "direct", "halfway"


def place_on(way: str, r: float) -> Place:
    """The place r on a way.

    Args:
        way: ``direct`` leads from the teacher (0) to the suspicious network (1), ``over the student`` to it (1) and on
            to the suspicious network (2); ``halfway`` lies half way between the student and the place r of ``direct``.
        r: how far.

    Example:
        >>> place_on("direct", 0.25), place_on("over the student", 1.25), place_on("halfway", 0.5)
        ((0.0, 0.25), (0.75, 0.25), (0.5, 0.25))
    """
    if way == OVER:
        return (r, 0.0) if r <= 1 else (2 - r, r - 1)
    return (0.5, r / 2) if way == HALFWAY else (0.0, r)


@torch.no_grad()
def set_at(network: nn.Module, place: Place, teacher: State, student: State, suspicious: State) -> None:
    """Give ``network`` the weights and statistics of a place; counters are those of the teacher."""
    there = ((1 - sum(place), teacher), (place[0], student), (place[1], suspicious))
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            parts = [share * state[name].to(value.device).float() for share, state in there if share]
            value.copy_(torch.stack(parts).sum(dim=0))
        else:
            value.copy_(teacher[name])
    torch.clear_autocast_cache()  # else what follows would run on half-precision copies of the weights before
