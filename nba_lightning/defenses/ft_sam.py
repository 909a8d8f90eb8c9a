"""Fine-tuning with sharpness-aware minimisation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_range
from nba_lightning.core.features import predict
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.modes import frozen_statistics
from nba_lightning.training.defense import Defense


class FTSAM(Defense):
    r"""Fine-tune at the worst weights near by, so that neurons of the backdoor shrink.

    .. math::
        \min_w CE(w + \epsilon), \quad
        \epsilon = \rho\, \frac{w^2 g}{\| |w| g \|_2}, \quad g = \nabla_w CE(w)

    Adaptive: a weight is moved in proportion to its own size, so the large ones, where the backdoor sits, move most.
    The first pass is under the current weights; the second, at the moved ones, gives the gradient of the step and does
    not touch BatchNorm statistics.

    Source: Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization", ICCV 2023
    (arXiv 2304.11823), section 3.3: rho 2 on CIFAR-10. Learning rate 0.01, label smoothing 0.1 (of the other classes
    there, of all classes here) and 100 epochs with a cosine at batches of 256 are those of the authors' benchmark.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        rho: radius of the neighbourhood.
        label_smoothing: share of the labels that is spread over all classes, in [0, 1).
        lr: initial learning rate.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        rho: float = 2.0,
        label_smoothing: float = 0.1,
        lr: float = 0.01,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        check_range("rho", rho, 0.0, float("inf"))
        check_range("label_smoothing", label_smoothing, 0.0, 1.0, open_high=True)
        self.rho, self.label_smoothing = rho, label_smoothing
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

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
        steps = adaptive_step(parameters, gradients, self.rho)
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
def adaptive_step(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    r""":math:`\rho\, w^2 g / \| |w| g \|_2` for all tensors together; see :class:`FTSAM`.

    Source: Kwon et al., "ASAM: adaptive sharpness-aware minimization", ICML 2021 (arXiv 2102.11600), equation 4.
    """
    weighted = [p.abs() * g for p, g in zip(parameters, gradients, strict=True)]
    norm = torch.stack([w.float().norm() for w in weighted]).norm().clamp(min=1e-12)
    return [(rho / norm) * p.abs() * w for p, w in zip(parameters, weighted, strict=True)]
