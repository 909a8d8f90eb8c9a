"""Implanting a backdoor in a flat valley of the loss, out of which fine-tuning does not easily lead."""

from typing import Any

from torch import nn

from nba_lightning.training.sharpness import SharpnessAware


class FlattenedTraining(SharpnessAware):
    r"""Train on the poisoned set by sharpness-aware minimisation; goes with any attack that poisons images.

    Source of the idea: Pham et al., "Flatness-aware sequential learning generates resilient backdoors", ECCV 2024
    (arXiv 2407.14738), whose code (mail-research/SBL-resilient-backdoors) minimises by plain SAM at rho 0.05 while it
    poisons, and goes on with clean images behind it. Here it is the poisoned training alone. A budget of 3 in the
    adaptive form is a choice of ours, above the 2 that FT-SAM defends with; it is no published setting.

    Args:
        model: the network.
        weights: a file with weights to start from; ``None`` if ``model`` has them already.
        rho: radius of the neighbourhood.
        adaptive: whether weights are moved in proportion to their own size (ASAM); plain SAM takes far smaller radii.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    def __init__(
        self, model: nn.Module, weights: str | None = None, rho: float = 3.0, adaptive: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(model, weights, rho, adaptive, **kwargs)
