"""The course of a fit: the learning rate as a pure function of the step, and the length of an epoch."""

import math

import lightning.pytorch as pl

from nba_lightning.core.checks import expected

_STEPS_OF_CRAFTED = 25


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


def epochs_of_crafted(trainer: pl.Trainer, times: int = 1) -> int:
    """Epochs that what is crafted serves at least: those of 25 steps, or some times as many."""
    return math.ceil(times * _STEPS_OF_CRAFTED / batches_of_an_epoch(trainer))


def cosine_factor(step: int, steps: int, warmup: float = 0.0) -> float:
    """Factor on the learning rate: a linear warm-up, then a cosine to 0.

    Args:
        step: optimiser step, from 0.
        steps: steps of the whole fit.
        warmup: share of them that warms up, in [0, 1).

    Returns:
        A factor in [0, 1]; 0 behind the last step.
    """
    if step >= steps:
        return 0.0
    progress = step / steps
    if progress < warmup:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
