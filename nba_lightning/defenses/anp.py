"""Adversarial neuron pruning."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.modes import frozen_statistics
from nba_lightning.core.randomness import generator_for
from nba_lightning.training.neuron_masks import NeuronMasks


class ANP(NeuronMasks):
    r"""Prune the neurons whose perturbation hurts most: those of the backdoor.

    .. math::
        \min_{m \in [0, 1]^n} \; \alpha\, CE(m \odot w, b)
        + (1 - \alpha) \max_{\delta, \xi \in [-\epsilon, \epsilon]^n} CE((m + \delta) \odot w, (1 + \xi) \odot b)

    over one mask value m for each BatchNorm channel with weight w and bias b; the network's weights do not train. When
    the fit ends, channels whose mask is below ``threshold`` get weight 0 and keep their bias, as in the first term;
    validation sees the network as pruned so far.

    Source: Wu & Wang, "Adversarial neuron pruning purifies backdoored deep models", NeurIPS 2021 (arXiv 2110.14430),
    section 4, equation 3, and the authors' code: epsilon 0.4, one step, alpha 0.2, SGD at 0.2 with momentum 0.9 over
    2,000 batches of 128. That code lets a perturbation leave [-epsilon, epsilon] after its random start; we project it
    back, as the equation says. Its rate is constant, ours a cosine with Nesterov momentum. The authors' code tries
    thresholds from 0 to 0.9, a public benchmark, whose rate is 0.01 at batches of 256, picks the one with the lowest
    ASR on the *test* images within 10 % of the accuracy; here it is fixed at 0.2, since a defender cannot.

    Args:
        model: the suspicious network; it must have BatchNorm layers with weights.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        epsilon: bound on the perturbations, relative to weight and bias.
        steps: gradient steps of the inner maximisation.
        alpha: weight of the unperturbed loss, in [0, 1].
        threshold: masks below this are pruned, in [0, 1].
        lr: initial learning rate of the masks.
        weight_decay: of the masks.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if the network has no BatchNorm layer with weights, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        epsilon: float = 0.4,
        steps: int = 1,
        alpha: float = 0.2,
        threshold: float = 0.2,
        lr: float = 0.2,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, weight_decay=weight_decay, warmup=warmup, **kwargs)
        check_range("epsilon", epsilon, 0.0, float("inf"))
        check_at_least("steps", steps, 1)
        check_range("alpha", alpha, 0.0, 1.0)
        check_range("threshold", threshold, 0.0, 1.0)
        self.epsilon, self.steps, self.alpha, self.threshold = epsilon, steps, alpha, threshold

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [0, 1] to logits `(B, K)` of the network as pruned by the masks of this moment."""
        kept = [(mask >= self.threshold).to(mask.dtype) for mask in self.masks]
        return self.masked(images, kept)

    def passes_of_step(self) -> float:
        """The steps to the worst perturbation, and the loss with and without it."""
        return 2 * self.steps + 4

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The masks' loss under the worst perturbation of the neurons."""
        images, labels = self.unpack(batch, batch_idx)
        generator = generator_for(self.seed, 6, self.trainer.current_epoch, batch_idx, device=images.device)
        with frozen_statistics(self.model):
            delta, xi = self._worst(images, labels, generator)
            logits = self._perturbed(images)
            clean = F.cross_entropy(logits, labels)
            robust = F.cross_entropy(self._perturbed(images, delta, xi), labels)
        loss = self.alpha * clean + (1 - self.alpha) * robust
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return loss

    def _perturbed(
        self, images: Tensor, delta: Sequence[Tensor] | None = None, xi: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Logits with every BatchNorm's weight times (m + delta) and bias times (1 + xi)."""
        weights = self.masks if delta is None else [mask + one for mask, one in zip(self.masks, delta, strict=True)]
        return self.masked(images, weights, None if xi is None else [1 + one for one in xi])

    def _worst(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Signed gradient ascent from a random start, inside the bound."""
        count = len(self.masks)
        noise = [
            (torch.rand(mask.shape, generator=generator, device=mask.device) * 2 - 1) * self.epsilon
            for mask in (*self.masks, *self.masks)
        ]
        for _ in range(self.steps):
            leaves = [value.requires_grad_() for value in noise]
            loss = F.cross_entropy(self._perturbed(images, leaves[:count], leaves[count:]), labels)
            # The same perturbation on all processes: the worst for the images of all.
            gradients = [self.reduce(gradient) for gradient in torch.autograd.grad(GRADIENT_SCALE * loss, leaves)]
            noise = [
                (leaf.detach() + self.epsilon / self.steps * gradient.sign()).clamp(-self.epsilon, self.epsilon)
                for leaf, gradient in zip(leaves, gradients, strict=True)
            ]
        return tuple(noise[:count]), tuple(noise[count:])

    @torch.no_grad()
    def prune(self) -> int:
        """Set the weights of the channels whose mask is below the threshold to 0; how many those are."""
        pruned = 0
        for name, mask in zip(self.norms, self.masks, strict=True):
            gone = mask < self.threshold
            self.norm(name).weight[gone] = 0.0
            pruned += int(gone.sum())
        rank_zero_info(f"{pruned} of {sum(len(mask) for mask in self.masks)} channels are pruned.")
        return pruned
