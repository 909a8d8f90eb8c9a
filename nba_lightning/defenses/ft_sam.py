"""Fine-tuning with sharpness-aware minimisation."""

from typing import Any

from torch import nn

from nba_lightning.training.defense import Defense
from nba_lightning.training.sharpness import SharpnessAware


class FTSAM(SharpnessAware, Defense):
    r"""Fine-tune at the worst weights near by, so that neurons of the backdoor shrink.

    .. math::
        \min_w CE(w + \epsilon), \quad
        \epsilon = \rho\, \frac{w^2 g}{\| |w| g \|_2}, \quad g = \nabla_w CE(w)

    Adaptive: a weight is moved in proportion to its own size, so the large ones, where the backdoor sits, move most.

    Source: Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization", ICCV 2023
    (arXiv 2304.11823), section 3.3: rho 2 on CIFAR-10. Learning rate 0.01, label smoothing 0.1 (of the other classes
    there, of all classes here) and 100 epochs at batches of 256 are those of the authors' benchmark. There momentum is
    plain, and a cosine of 100 steps goes on with each batch, so that the rate falls and rises five times and ends where
    it began; here momentum is Nesterov's, and one cosine falls to 0.

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
        super().__init__(model, weights, rho, label_smoothing=label_smoothing, lr=lr, warmup=warmup, **kwargs)
