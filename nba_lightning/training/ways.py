"""Networks on the ways between other networks of the same architecture."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
Place = tuple[State, State, float]
"""Between which weights, and how far from the first, as a share of the way."""


def over_the_student(r: float, teacher: State, student: State, suspicious: State) -> Place:
    """The place r on the way from the teacher (0) over the student (1) to the suspicious network (2)."""
    return (student, suspicious, r - 1) if r > 1 else (teacher, student, r)


@torch.no_grad()
def set_between(network: nn.Module, start: State, end: State, share: float) -> None:
    """Weights and statistics of ``network``: ``start`` + share * (``end`` - ``start``)."""
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(start[name].to(value.device).float(), end[name].to(value.device).float(), share))
        else:
            value.copy_(end[name] if share else start[name])
    torch.clear_autocast_cache()  # else what follows would run on half-precision copies of the weights before
