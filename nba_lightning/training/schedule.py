"""The course of a fit: the learning rate as a pure function of the step, and the length of an epoch."""

import math
from collections.abc import Sequence

import lightning.pytorch as pl

from nba_lightning.core.checks import expected


def batches_of_an_epoch(trainer: pl.Trainer) -> int:
    """Training batches of an epoch on this process; loaders are set up if they are not yet.

    Raises:
        ValueError: where the loader has no length.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if math.isinf(batches):
        raise expected("limit_train_batches", "given where the loader has no length", trainer.limit_train_batches)
    return int(batches)


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
