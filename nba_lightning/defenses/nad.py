"""Neural Attention Distillation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, expected
from nba_lightning.core.features import features
from nba_lightning.core.functional import attention_map
from nba_lightning.core.layers import resolve_layers
from nba_lightning.training.distillation import Distillation


class NAD(Distillation):
    r"""Align the attention maps of the student with those of a fine-tuned teacher, on clean images.

    .. math:: CE(S(x), y) + \sum_l \beta_l \frac{1}{B T_l} \| A(f_l(S, x)) - A(f_l(T, x)) \|^2

    A is the spatial attention map of T_l positions (sum of squares over channels, as a unit vector); the squared
    distance is a mean over images and positions, as in the authors' code.

    Source: Li et al., "Neural attention distillation: erasing backdoor triggers from deep neural networks", ICLR 2021
    (arXiv 2101.05930), sections 3.2 and 4.1. Weights 500, 1000, 1000 for a WideResNet-16-1's three blocks,
    batches of 64 and the rate of 0.1 are the authors'; ten epochs each for teacher and student are a public
    benchmark's (the authors' code takes 20 for the student, a rate that falls to 0.01 after two epochs, where ours is
    a cosine, and a weight decay of 1e-4). That benchmark, on PreActResNet-18, weighs ``layer3`` with 500 and ``layer4``
    with 1000, at a constant 0.01 in batches of 256; as its third block it taps the pooled layer, whose map has one
    position and is constant.

    Args:
        model: the suspicious network, the student.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        layers: module paths of the observed blocks; ``None`` takes the network's own default.
        betas: weight of each layer; ``None`` is 500 for the first and 1000 for the others.
        power: exponent of the attention map.
        **kwargs: ``teacher`` or ``teacher_weights`` of :class:`~nba_lightning.training.distillation.Distillation`, and
            further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: for an unknown layer, a number of weights other than that of layers, or a negative weight.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        layers: Sequence[str] | None = None,
        betas: Sequence[float] | None = None,
        power: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, **kwargs)
        self.layers = resolve_layers(model, layers)
        if self.teacher is not None:
            resolve_layers(self.teacher.network, self.layers)
        self.betas = [500.0, *[1000.0] * (len(self.layers) - 1)] if betas is None else list(betas)
        if len(self.betas) != len(self.layers):
            raise expected("betas", f"{len(self.layers)} weights, one for each layer", betas)
        for beta in self.betas:
            check_at_least("betas", beta, 0.0)
        check_at_least("power", power, 1.0)
        self.power = power

    def observed_layers(self) -> list[str]:
        """The layers that are aligned."""
        return self.layers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy and attention distances."""
        images, labels = self.unpack(batch, batch_idx)
        logits, observed = features(self.model, images, self.layers)
        with torch.no_grad():
            wanted = features(self.teacher_network(), images, self.layers)[1]
        distances = [
            beta * F.mse_loss(attention_map(observed[name], self.power), attention_map(wanted[name], self.power))
            for name, beta in zip(self.layers, self.betas, strict=True)
        ]
        attention, cross_entropy = torch.stack(distances).sum(), F.cross_entropy(logits, labels)
        self.log("train/attention", attention)
        self.log("train/clean_ce", cross_entropy)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        loss = cross_entropy + attention
        self.log("train/loss", loss, prog_bar=True)
        return loss
