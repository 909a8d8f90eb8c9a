"""Fine-tuning: the plainest defence, and the teacher of NBA."""

from typing import Any

from torch import nn

from nba_lightning.training.defense import Defense


class FineTuning(Defense):
    """Go on training the suspicious network on the defender's clean images.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`. A high learning
            rate is what removes backdoors.
    """

    def __init__(self, model: nn.Module, weights: str | None = None, warmup: float = 0.0, **kwargs: Any) -> None:
        super().__init__(model, weights, warmup=warmup, **kwargs)
