"""Steps along the gradient at the worst weights near by: sharpness-aware minimisation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_range
from nba_lightning.core.features import predict
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.modes import frozen_statistics
from nba_lightning.training.classifier import Classifier


class SharpnessAware(Classifier):
    r"""Base class of modules that step along the gradient at weights moved by :func:`step_up`.

    The first pass is under the current weights; the second, at the moved ones, gives the gradient of the step and does
    not touch BatchNorm statistics.

    Args:
        model: the network.
        weights: a file with its weights; ``None`` if ``model`` has them already.
        rho: radius of the neighbourhood.
        adaptive: whether weights are moved in proportion to their own size.
        label_smoothing: share of the labels that is spread over all classes, in [0, 1).
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    needs_whole_network = True

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        rho: float = 2.0,
        adaptive: bool = True,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, **kwargs)
        check_range("rho", rho, 0.0, float("inf"))
        check_range("label_smoothing", label_smoothing, 0.0, 1.0, open_high=True)
        self.rho, self.adaptive, self.label_smoothing = rho, adaptive, label_smoothing
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def passes_of_step(self) -> float:
        """Two passes there and back."""
        return 4 + len(self.frozen())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss at the moved weights; they move back after its backward pass."""
        images, labels = self.unpack(batch, batch_idx)
        logits = predict(self.model, images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        self.log("train/loss", loss.detach(), prog_bar=True)
        parameters = self.trained_parameters()
        gradients = [
            self.reduce(gradient)  # of all processes' images, as the step's is
            for gradient in torch.autograd.grad(GRADIENT_SCALE * loss, parameters)
        ]
        self._kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
        steps = step_up(parameters, gradients, self.rho, self.adaptive)
        self._set([(p, p.detach() + step) for p, step in zip(parameters, steps, strict=True)])
        with frozen_statistics(self.model):
            return F.cross_entropy(predict(self.model, images), labels, label_smoothing=self.label_smoothing)

    def on_after_backward(self) -> None:
        """Move the weights back, to the bit."""
        self._set(self._kept)
        self._kept = []

    @torch.no_grad()
    def _set(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        for parameter, value in values:
            parameter.copy_(value)
        torch.clear_autocast_cache()  # else the next pass would run on the half-precision copies of the old weights


@torch.no_grad()
def step_up(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool = True
) -> list[Tensor]:
    r"""The step of length rho along which the loss rises most: :math:`\rho\, g / \| g \|_2` for all tensors together.

    Adaptive: :math:`\rho\, w^2 g / \| |w| g \|_2`, whose length is measured in units of each weight's own size.

    Source: Foret et al., "Sharpness-aware minimization for efficiently improving generalization", ICLR 2021 (arXiv
    2010.01412), equation 2; adaptive: Kwon et al., "ASAM: adaptive sharpness-aware minimization", ICML 2021 (arXiv
    2102.11600), equation 4.
    """
    sizes = [p.abs() if adaptive else torch.ones_like(p) for p in parameters]
    weighted = [size * g for size, g in zip(sizes, gradients, strict=True)]
    norm = torch.stack([w.float().norm() for w in weighted]).norm().clamp(min=1e-12)
    return [(rho / norm) * size * w for size, w in zip(sizes, weighted, strict=True)]
