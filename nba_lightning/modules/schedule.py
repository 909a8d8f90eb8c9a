"""Learning rate over a fit, as a pure function of the step."""

import math
from collections.abc import Sequence


def cosine_factor(step: int, phases: Sequence[tuple[int, float]], warmup: float = 0.0) -> float:
    """Factor on the learning rate: a linear warm-up, then a cosine to 0, anew in each phase.

    Args:
        step: optimiser step, from 0.
        phases: the step at which each phase ends, ascending, and the factor at its height.
        warmup: share of each phase that warms up, in [0, 1).

    Returns:
        A factor of at most that height; 0 behind the last phase.
    """
    start = 0
    for end, height in phases:
        if step < end:
            progress = (step - start) / (end - start)
            if progress < warmup:
                return height * (step - start + 1) / (warmup * (end - start) + 1)
            return height * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
        start = end
    return 0.0
