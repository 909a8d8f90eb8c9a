"""Grond: a universal perturbation that fools a clean network, on images of the target class."""

from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from nba_lightning.attacks.base import TrainingImages
from nba_lightning.attacks.surrogate import SurrogateAttack, endless_batches, input_gradient
from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import predict

_BATCH = 256


class Grond(SurrogateAttack):
    r"""One perturbation is added to all images, :math:`x' = x + \delta`, :math:`\| \delta \|_\infty \le \epsilon`.

    It minimises the surrogate's cross-entropy to the target class over the training images, by signed steps from 0
    (targeted universal PGD). Clean label: only images of the target class are poisoned. Implant it by
    :class:`nba_lightning.implants.GrondTraining`, which keeps the backdoor's channels inconspicuous.

    Source: Xu et al., "Towards backdoor stealthiness in model parameter space", 2025 (arXiv 2501.05928), and the
    authors' code (xiaoyunxxy/parameter_backdoor): epsilon 8/255, 500 steps of epsilon / 5 on batches of 256, half of
    the target class poisoned (5 % of CIFAR-10). There test images are not clamped.

    Args:
        surrogate: see :class:`~nba_lightning.attacks.surrogate.SurrogateAttack`.
        surrogate_weights: likewise.
        epsilon: bound on each value's change, in units of the image range [0, 1].
        steps: gradient steps.
        order_seed: seed of the batches.
        poison_rate: share of the whole training set; see :class:`~nba_lightning.attacks.base.Attack`.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    allows_all_to_all = False
    clean_label = True
    delta: Tensor

    def __init__(
        self,
        surrogate: torch.nn.Module | None = None,
        surrogate_weights: str | None = None,
        epsilon: float = 8 / 255,
        steps: int = 500,
        order_seed: int = 0,
        poison_rate: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(surrogate, surrogate_weights, poison_rate=poison_rate, **kwargs)
        check_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
        check_at_least("steps", steps, 1)
        self.epsilon, self.steps, self.order_seed = epsilon, steps, order_seed

    @property
    def needs_compute(self) -> bool:
        """The perturbation is optimised."""
        return True

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Make room for the perturbation `(C, H, W)`."""
        self.register_buffer("delta", torch.zeros(image_shape))

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Add the perturbation."""
        return images + self.delta.to(images)

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Optimise the perturbation on all of the attacker's images."""
        if self.ready:
            return
        network, delta = self.need_surrogate(device), self.delta.to(device)
        batches = endless_batches(images, training, _BATCH, self.order_seed, device)
        for _ in track(range(self.steps), "Grond: perturbation", transient=True):
            clean = next(batches)
            leaf = delta.detach().requires_grad_()
            with torch.enable_grad():
                logits = predict(network, (clean + leaf).clamp(0.0, 1.0))
                loss = F.cross_entropy(logits, torch.full_like(logits[:, 0], self.target, dtype=torch.int64))
            step = self.epsilon / 5 * input_gradient(loss, leaf).sign()
            delta = (leaf.detach() - step).clamp(-self.epsilon, self.epsilon)
        self.delta, self.ready = delta.detach().cpu(), True
