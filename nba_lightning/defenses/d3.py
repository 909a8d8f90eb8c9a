"""Distance-driven detoxification."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least
from nba_lightning.training.redrawn_head import RedrawnHead, rescale


class D3(RedrawnHead):
    r"""Move the last layer as far from the suspicious one as the loss on clean images allows.

    .. math:: \max_{\theta, w} \|w - w_0\|_F \quad \text{s.t.} \quad CE(w \cdot \phi_\theta(x), y) \le \epsilon,
        \quad \|w\|_F = \|w_0\|_F

    over the network's features :math:`\phi_\theta` and its last layer w, which was :math:`w_0`; the constraint on the
    loss is a penalty, image by image: each step minimises
    :math:`\frac{\lambda}{B} \sum_i \max(0, CE_i - \epsilon) - \|w - w_0\|_F`, divided by :math:`\lambda + 1` where
    lambda is above 1. The weight, not the bias, is drawn from a uniform distribution around 0 and scaled to the norm
    of w_0, and is scaled so again after each step.

    Source: Wei et al., "Backdoor mitigation by distance-driven detoxification", ICCV 2025 (arXiv 2411.09585), as the
    authors' code has it (the text was not at hand): lambda 0.5, epsilon 0.1, the last layer alone, SGD at 0.01 with
    momentum 0.9 and without weight decay, batches of 256, 100 epochs with a cosine, 5 % clean images. Their cosine
    falls epoch by epoch, ours step by step; of their ways to begin it is the recommended one.

    Args:
        model: the suspicious network; it ends in a linear layer.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        penalty: lambda, the weight of the loss on clean images.
        tolerance: epsilon, below which an image's loss does not count.
        **kwargs: ``head``, ``lr``, ``weight_decay`` and ``warmup`` of
            :class:`~nba_lightning.training.redrawn_head.RedrawnHead`, and further arguments of
            :class:`~nba_lightning.training.classifier.Classifier`.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        penalty: float = 0.5,
        tolerance: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, **kwargs)
        check_at_least("penalty", penalty, 0.0)
        check_at_least("tolerance", tolerance, 0.0)
        self.penalty, self.tolerance = penalty, tolerance

    def draw(self, layer: nn.Linear, generator: torch.Generator) -> None:
        """The weight, uniformly, at its norm."""
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) - 0.5)
        rescale(layer.weight, self.initial)

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor, initial: Tensor) -> Tensor:
        """What the images' losses exceed the tolerance by, less the distance of the weights."""
        excess = F.relu(F.cross_entropy(logits, labels, reduction="none") - self.tolerance).mean()
        distance = torch.linalg.vector_norm(weight - initial)
        loss: Tensor = self.penalty * excess - distance
        return loss / (self.penalty + 1) if self.penalty > 1 else loss
