"""Feature shift tuning."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least
from nba_lightning.training.redrawn_head import RedrawnHead


class FST(RedrawnHead):
    r"""Fine-tune from a last layer drawn anew that is kept from turning back to the old one, so that features move.

    .. math:: \min_{\theta, w} CE(w \cdot \phi_\theta(x), y) + \alpha \langle w, w_0 \rangle
        \quad \text{s.t.} \quad \|w\|_F = \|w_0\|_F

    over the network's features :math:`\phi_\theta` and its last layer w, which was :math:`w_0`. Its weight and bias
    are drawn from :math:`U(-1/\sqrt{F}, 1/\sqrt{F})` for F features; after each step w is scaled to the norm of w_0.

    Source: Min et al., "Towards stable backdoor purification through feature shift tuning", NeurIPS 2023 (arXiv
    2310.01875), as the authors' code has it (the text was not at hand). Alpha 0.1, SGD at 0.01 with momentum
    0.9 and without weight decay, batches of 128, ten epochs and a cosine are those of the authors' command for
    CIFAR-10, whose code takes an alpha of 0.2 where none is given; for many classes they advise less, or 0. They take
    2 % of the training images. Their cosine falls epoch by epoch, ours step by step.

    Args:
        model: the suspicious network; it ends in a linear layer.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        alpha: weight of the inner product.
        **kwargs: ``head``, ``lr``, ``weight_decay`` and ``warmup`` of
            :class:`~nba_lightning.training.redrawn_head.RedrawnHead`, and further arguments of
            :class:`~nba_lightning.training.classifier.Classifier`.
    """

    def __init__(self, model: nn.Module, weights: str | None = None, alpha: float = 0.1, **kwargs: Any) -> None:
        super().__init__(model, weights, **kwargs)
        check_at_least("alpha", alpha, 0.0)
        self.alpha = alpha

    def draw(self, layer: nn.Linear, generator: torch.Generator) -> None:
        """Weight and bias, uniformly."""
        for parameter in layer.parameters():
            uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(uniform / layer.in_features**0.5)

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor, initial: Tensor) -> Tensor:
        """Cross-entropy and the inner product of new and old weight."""
        return F.cross_entropy(logits, labels) + self.alpha * (weight * initial).sum()
