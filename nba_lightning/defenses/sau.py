"""Shared adversarial unlearning."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import predict
from nba_lightning.core.functional import GRADIENT_SCALE, js_divergence
from nba_lightning.core.modes import Frozen, evaluating
from nba_lightning.training.classifier import OptimizerFactory
from nba_lightning.training.defense import Defense


class SAU(Defense):
    r"""Unlearn adversarial examples that fool the network and the suspicious network alike, in the same way.

    Each step crafts perturbations within :math:`\|d\|_\infty \le \epsilon` that minimise

    .. math:: -\tfrac{\beta_1}{2} (CE(f(x + d), y) + CE(f_0(x + d), y)) + \beta_2\, JS(f(x + d), f_0(x + d))

    for the network f and the suspicious one f_0, then minimises

    .. math:: CE(f(x), y) - \frac{1}{B} \sum_{i \in P} \log (1 - f_{\hat y_i}(x_i + d_i))

    over f, where P are the images whose perturbed version f_0 gets wrong, and :math:`\hat y` is what f_0 says there.

    Source: Wei et al., "Shared adversarial unlearning: backdoor mitigation by unlearning shared adversarial
    examples", NeurIPS 2023 (arXiv 2307.10562), section 4. Settings as in the authors' benchmark: epsilon 0.2, five
    signed steps of 0.2 from +epsilon, beta 0.01 and 1, Adam at 1e-4, batches of 256. As there, images may leave [0,
    1] under d, an image whose aim is reached no longer pulls, and BatchNorm is in ``eval`` mode throughout. There Adam
    is AMSGrad at a constant rate and images are not augmented; here a cosine falls to 0 and the loader's augmentation
    holds, as for all defences.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        epsilon: bound on each value of a perturbation, in units of the image range [0, 1].
        steps: gradient steps for each batch.
        step_size: length of a step in each value.
        adversarial: weight beta_1.
        shared: weight beta_2.
        unlearning: weight of the second term of the network's loss.
        lr: initial learning rate.
        optimizer: as a callable from parameters; ``None`` is Adam at ``lr``, without momentum and weight decay.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    stays_in_eval_mode = True

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        epsilon: float = 0.2,
        steps: int = 5,
        step_size: float = 0.2,
        adversarial: float = 0.01,
        shared: float = 1.0,
        unlearning: float = 1.0,
        lr: float = 1e-4,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, optimizer=optimizer, warmup=warmup, **kwargs)
        check_range("epsilon", epsilon, 0.0, 1.0)
        check_at_least("steps", steps, 1)
        for name, value in {"step_size": step_size, "adversarial": adversarial, "shared": shared}.items():
            check_at_least(name, value, 0.0)
        check_at_least("unlearning", unlearning, 0.0)
        self.epsilon, self.steps, self.step_size = epsilon, steps, step_size
        self.adversarial, self.shared, self.unlearning = adversarial, shared, unlearning
        self.suspicious = Frozen(model)

    def default_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Adam."""
        return Adam(parameters, self.lr)

    def passes_of_step(self) -> float:
        """The clean images, both networks in each step of crafting, and what was crafted."""
        return 4 * self.steps + 6 if self.unlearning else 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy and the unlearning of shared adversarial examples."""
        images, labels = self.unpack(batch, batch_idx)
        logits = predict(self.model, images)
        loss = F.cross_entropy(logits, labels)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        if self.unlearning:
            with torch.no_grad():
                before = [logits.argmax(dim=1), predict(self.suspicious, images).argmax(dim=1)]
            perturbed = images + self.craft(images, labels, before)
            with torch.no_grad():
                answers = predict(self.suspicious, perturbed).argmax(dim=1)
            fooled = (answers != labels) & (answers != before[1])
            loss = loss + self.unlearning * unlearning_loss(predict(self.model, perturbed), answers, fooled)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def craft(self, images: Tensor, labels: Tensor, before: Sequence[Tensor]) -> Tensor:
        """Perturbations `(B, C, H, W)` that both networks share.

        Args:
            images: `(B, C, H, W)`, clean, in [0, 1].
            labels: `(B,)`.
            before: `(B,)` what the network and the suspicious network say of the clean images.
        """
        perturbations = torch.full_like(images, self.epsilon)
        with evaluating(self.model, self.suspicious):
            for _ in range(self.steps):
                leaf = perturbations.detach().requires_grad_()
                logits = [predict(network, images + leaf) for network in (self.model, self.suspicious)]
                loss = self._crafting_loss(logits, before, labels)
                step = torch.autograd.grad(GRADIENT_SCALE * loss, leaf)[0].sign()
                perturbations = (leaf.detach() - self.step_size * step).clamp(-self.epsilon, self.epsilon)
        return perturbations

    def _crafting_loss(self, logits: Sequence[Tensor], before: Sequence[Tensor], labels: Tensor) -> Tensor:
        answers = [one.argmax(dim=1) for one in logits]
        fooled = [answer != old for answer, old in zip(answers, before, strict=True)]
        entropies = [
            F.cross_entropy(one, labels, reduction="none") * ~done for one, done in zip(logits, fooled, strict=True)
        ]
        shared = fooled[0] & fooled[1] & (answers[0] == answers[1])
        apart = js_divergence(logits[0], logits[1]) * ~shared
        return (-self.adversarial * (entropies[0] + entropies[1]) / 2 + self.shared * apart).mean()


def unlearning_loss(logits: Tensor, answers: Tensor, fooled: Tensor) -> Tensor:
    r""":math:`-\frac{1}{B} \sum_{i \in P} \log (1 - p_{\hat y_i})`, for logits `(B, K)` and answers `(B,)` to unlearn.

    Probabilities below 0.001 do not pull any more, so that the loss has an end.

    Args:
        logits: `(B, K)` of the network, on perturbed images.
        answers: `(B,)` what the suspicious network says there.
        fooled: `(B,)` bool, the images in P.
    """
    wrong = logits.float().softmax(dim=1).gather(1, answers[:, None])[:, 0].clamp(min=0.001)
    return -((1.0 + 1e-6 - wrong).log() * fooled).mean()
