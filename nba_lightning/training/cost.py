"""What a fit will cost, before it starts."""

import math
from dataclasses import dataclass, field
from typing import Any

from nba_lightning.core.heads import linear_layers
from nba_lightning.pseudo.base import PseudoSamples

CRAFTING = 0.5
"""Passes that crafting may take for each pass of the steps; so it is a third of both at most."""


@dataclass(frozen=True)
class Cost:
    """Passes of a fit: an image goes forwards or backwards through a network.

    Attributes:
        steps: optimiser steps.
        batch: images of a batch, of all processes.
        batches: batches of the fit.
        images: images of an epoch.
        of_step: passes of each image of a batch.
        beside: passes beside the steps, by what they are for; of what is not known before, the most.
    """

    steps: int
    batch: int
    batches: int
    images: int
    of_step: float
    beside: dict[str, int] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """All passes."""
        return round(self.batches * self.batch * self.of_step) + sum(self.beside.values())

    def __str__(self) -> str:
        """A sentence without its subject."""
        epochs = self.batches * self.batch / self.images
        text = (
            f"{self.steps:,} steps of {self.batches * self.batch // max(1, self.steps):,} images, {epochs:,.4g} passes "
            f"over {self.images:,} images; in all {self.passes:,} times an image goes through a network"
        )
        parts = [f"up to {share:.0%} of them for {what}" for what, share in self.shares().items()]
        return ", ".join([text, *parts])

    def shares(self) -> dict[str, float]:
        """Share of all passes of each thing beside the steps."""
        return {what: number / self.passes for what, number in self.beside.items() if number}


def cost_of(module: Any) -> Cost | None:
    """The cost of the fit that a module's Trainer is about to begin; ``None`` where the fit or its loader has no end.

    Args:
        module: a :class:`~nba_lightning.training.classifier.Classifier` with a Trainer whose loaders are set up.
    """
    trainer = module.trainer
    steps, each = trainer.estimated_stepping_batches, trainer.num_training_batches
    size = getattr(trainer.train_dataloader, "batch_size", None)
    if not (0 <= steps < math.inf and 0 < each < math.inf and isinstance(size, int)):
        return None
    batches = int(steps) * trainer.accumulate_grad_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = min(batches, trainer.max_epochs * int(each))
    batch = size * trainer.world_size
    images, epochs = int(each) * batch, math.ceil(batches / each)
    beside = {what: number for what, number in module.passes_beside(epochs, images, batch).items() if number}
    return Cost(int(steps), batch, batches, images, module.passes_of_step(), beside)


def passes_of_crafting(module: Any, epochs: int, images: int, batch: int) -> int:
    """Passes of what regenerates a module's pseudo samples, in a fit of so many epochs of so many images."""
    pseudo: PseudoSamples | None = getattr(module, "pseudo", None)
    if not (isinstance(pseudo, PseudoSamples) and hasattr(module, "regenerate") and module.pseudo_share):
        return 0
    every: int = getattr(module, "regenerate_every_n_epochs", 1)
    processes: int = module.trainer.world_size
    of_one = images // processes, batch // processes
    times = math.ceil(epochs / max(every, epochs_of_pseudo_samples(module, *of_one))) if every else 1
    return times * processes * pseudo.passes(of_one[1], number_of_classes(module))


def passes_of_paced_crafting(module: Any, epochs: int, passes: int) -> int:
    """Passes of crafting in a fit of a module that says how many epochs pseudo samples serve.

    Args:
        module: one with ``least_epochs_of_pseudo_samples``.
        epochs: of the fit.
        passes: of one regeneration on one process.
    """
    times = math.ceil(epochs / module.least_epochs_of_pseudo_samples())
    return int(module.trainer.world_size * times * passes)


def epochs_of_pseudo_samples(module: Any, images: float, batch: int) -> int:
    """Epochs that pseudo samples must serve for crafting to take no more than :data:`CRAFTING` of the steps' passes.

    Args:
        module: one with pseudo samples.
        images: of an epoch, on one process.
        batch: images of a step, likewise.
    """
    crafting: int = module.pseudo.passes(batch, number_of_classes(module))
    steps: float = images * module.passes_of_step()
    return max(1, math.ceil(crafting / (CRAFTING * steps)))


def passes_of_verification(module: Any, images: int) -> int:
    """The most passes of verifying what a module learned from the suspicious network; 0 where nothing is verified."""
    verification = getattr(module, "verification", None)
    if verification is None or getattr(module, "suspicious", None) is None:
        return 0
    return int(verification.passes_of_images(number_of_classes(module), images))


def number_of_classes(module: Any) -> int:
    """The data's number of classes, else that of the network's last linear layer."""
    known = getattr(getattr(module.trainer, "datamodule", None), "num_classes", None)
    layers = list(linear_layers(module.model).values())
    return int(known) if known is not None else layers[-1].out_features if layers else 1
