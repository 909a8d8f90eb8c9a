"""Attack success rate and robust accuracy as torchmetrics metrics. DER is in :mod:`nba_lightning.core.functional`."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

IGNORE_LABEL = -1
"""Label of padding: such samples count in no metric."""


class AttackSuccessRate(Metric):
    """Share of triggered images, true class not the target, that are predicted as the target.

    Samples whose target equals their label, or whose label is -1 (padding), do not count. States are sums, so the
    value over several processes is the value over the union of their samples. ``nan`` before the first sample.

    Args:
        **kwargs: arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = AttackSuccessRate()
        >>> metric.update(torch.tensor([0, 0, 2]), torch.tensor([1, 2, 2]), torch.tensor([0, 0, 0]))
        >>> float(metric.compute())
        0.6666666865348816
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    hits: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, labels: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            preds: `(B,)` predicted classes or `(B, K)` logits of triggered images.
            labels: `(B,)` true classes.
            targets: `(B,)` the classes that the attacker wants.
        """
        counted = (labels != targets) & (labels != IGNORE_LABEL)
        self.hits += ((_classes(preds) == self._wanted(labels, targets)) & counted).sum()
        self.total += counted.sum()

    def _wanted(self, labels: Tensor, targets: Tensor) -> Tensor:
        return targets

    def compute(self) -> Tensor:
        """The rate, a fraction in [0, 1]."""
        return self.hits.float() / self.total


class RobustAccuracy(AttackSuccessRate):
    """Share of the same images that are predicted as their true class. Arguments as :class:`AttackSuccessRate`."""

    higher_is_better = True

    def _wanted(self, labels: Tensor, targets: Tensor) -> Tensor:
        return labels


def _classes(preds: Tensor) -> Tensor:
    return preds.argmax(dim=1) if preds.ndim == 2 else preds
