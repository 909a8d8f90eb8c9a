"""Fine-tuning under adversarial neuron noise."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import logits_of, predict
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.layers import affine_norms
from nba_lightning.core.randomness import generator_for
from nba_lightning.training.defense import Defense


class BAN(Defense):
    r"""Fine-tune so that the network is right also under the noise on its neurons that would hurt it most.

    .. math::
        \min_{w, b} \; CE(f_{w, b}(x), y) + \lambda\, CE(f_{(1 + \delta) \odot w, (1 + \xi) \odot b}(x), y)

    over all weights of the network. Each step draws the noise on the weights w and biases b of all BatchNorm channels
    anew, uniform in :math:`[-\epsilon, \epsilon]`, and moves it uphill:
    :math:`\delta \leftarrow \delta + \frac{\epsilon}{s} \textrm{sign} \nabla_\delta CE` in each of s steps. It finds
    what an attacker left sensitive, since noise of this kind wakes backdoors first.

    Source: Xu et al., "BAN: detecting backdoors activated by adversarial neuron noise", NeurIPS 2024 (arXiv
    2405.19928), its mitigation, and the authors' code (``ban_finetune.py``) with the command that it recommends:
    epsilon 0.3, one step, lambda 0.5, SGD at 0.005 over 24 epochs of 5 % of CIFAR-10 in batches of 128, on a ResNet-18.
    As in that code, noise is not brought back into its bound after a step and so reaches :math:`2 \epsilon`, it is
    held fixed while the weights move, and BatchNorm learns its statistics from the noisy passes too. There the rate is
    constant and momentum plain; here a cosine falls to 0 with Nesterov momentum, as for all defences.

    Args:
        model: the suspicious network; it must have BatchNorm layers with weights.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        epsilon: bound of the random noise and length of all steps together, relative to weight and bias.
        steps: gradient steps that move the noise.
        robust: weight lambda of the loss under noise.
        lr: initial learning rate.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if the network has no BatchNorm layer with weights, or an argument is out of range.
    """

    compilable = False

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        epsilon: float = 0.3,
        steps: int = 1,
        robust: float = 0.5,
        lr: float = 0.005,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        check_range("epsilon", epsilon, 0.0, float("inf"))
        check_at_least("steps", steps, 1)
        check_at_least("robust", robust, 0.0)
        self.epsilon, self.steps, self.robust = epsilon, steps, robust
        self.norms = affine_norms(model)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy without and with the worst noise."""
        images, labels = self.unpack(batch, batch_idx)
        generator = generator_for(self.seed, 14, self.trainer.current_epoch, batch_idx, device=images.device)
        noise = self._worst(images, labels, generator)
        robust = F.cross_entropy(self._noisy(images, noise), labels)
        logits = predict(self.model, images)
        loss = F.cross_entropy(logits, labels) + self.robust * robust
        self.log("train/robust", robust)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return loss

    def _affine(self) -> dict[str, Tensor]:
        """Weights and biases of all BatchNorm layers, by name."""
        names = [f"{norm}.{kind}" for norm in self.norms for kind in ("weight", "bias")]
        return {name: self.model.get_parameter(name) for name in names}

    def _noisy(self, images: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Logits `(B, K)` with each BatchNorm's weight and bias times 1 + noise."""
        pairs = zip(self._affine().items(), noise, strict=True)
        changed = {name: value * (1 + one) for (name, value), one in pairs}
        return logits_of(functional_call(self.model, changed, (images,)))

    def _worst(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Noise `(C,)` of each weight and bias: signed gradient ascent from a random start."""
        noise = [
            (torch.rand(value.shape, generator=generator, device=value.device) * 2 - 1) * self.epsilon
            for value in self._affine().values()
        ]
        for _ in range(self.steps):
            leaves = [one.requires_grad_() for one in noise]
            loss = F.cross_entropy(self._noisy(images, leaves), labels)
            # The same noise on all processes: the worst for the images of all.
            gradients = [self.reduce(gradient) for gradient in torch.autograd.grad(GRADIENT_SCALE * loss, leaves)]
            noise = [
                leaf.detach() + self.epsilon / self.steps * gradient.sign()
                for leaf, gradient in zip(leaves, gradients, strict=True)
            ]
        return noise
