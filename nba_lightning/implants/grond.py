"""Adversarial backdoor injection: channels that stand out are levelled while the backdoor is trained."""

from typing import Any

from torch import nn

from nba_lightning.core.checks import check_at_least
from nba_lightning.core.lipschitz import level_channels
from nba_lightning.training.classifier import Classifier


class GrondTraining(Classifier):
    r"""Train on the poisoned set; between epochs, channels with a large Lipschitz constant are made ordinary.

    A channel whose bound (:func:`~nba_lightning.core.lipschitz.channel_lipschitz`) lies more than u standard deviations
    above its layer's mean gets the layer's mean BatchNorm weight and bias, so that the backdoor spreads over channels
    that do not stand out. Goes with :class:`~nba_lightning.attacks.Grond`, and with any other attack.

    Source: Xu et al., "Towards backdoor stealthiness in model parameter space", 2025 (arXiv 2501.05928), adversarial
    backdoor injection; u 3, after every epoch but the last, whose weights are kept, as in the authors' code
    (xiaoyunxxy/parameter_backdoor). They train for 200 epochs from a rate of 0.01. Their bound has no epsilon beneath
    the root.

    Args:
        model: the network.
        u: standard deviations above the mean from which on a channel stands out.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    needs_whole_network = True

    def __init__(self, model: nn.Module, u: float = 3.0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        check_at_least("u", u, 0.0)
        self.u = u

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Level the channels before an epoch's first step, which a fit that goes on takes once too."""
        if batch_idx == 0 and self.trainer.current_epoch > 0:
            level_channels(self.model, self.u, self.reduce)
