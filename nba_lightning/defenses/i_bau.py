"""Implicit backdoor adversarial unlearning."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Adam, Optimizer

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import predict
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.batches import clean_batches
from nba_lightning.training.classifier import OptimizerFactory
from nba_lightning.training.defense import Defense
from nba_lightning.training.schedule import batches_of_an_epoch


class IBAU(Defense):
    r"""Unlearn a universal perturbation, counting how the perturbation would react.

    .. math::
        \min_\theta CE(f_\theta(x + d^*), y), \quad
        d^* = \arg\max_d CE(f_\theta(x + d), f_\theta(x)) - 0.001 \|d\|^2

    Each epoch is a round: gradient steps over the clean images find d, then each batch gives a step on the weights
    along the implicit hypergradient, which K fixed-point iterations approximate.

    Source: Zeng et al., "Adversarial unlearning of backdoors via implicit hypergradient", ICLR 2022 (arXiv
    2110.03735), section 4 and algorithm 1. Settings as in a public benchmark: 5 rounds, K = 5, Adam at 1e-4 (AMSGrad,
    constant there, a cosine here), batches of 256, d by SGD at 10 from 0 in each round, inner step 0.1, d on a random
    1 % of each batch (at least one image here), ``eval`` mode throughout; images may leave [0, 1] under d. That
    benchmark adds d to images divided by their standard deviation s, the authors to images in [0, 1], as here; its d is
    ours with both steps times s^2 and the penalty over s^2. The authors' code takes Adam at a constant 1e-3 and batches
    of 100.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        iterations: fixed-point iterations K.
        inner_lr: step of the gradient steps that find d.
        inner_step: step of the fixed-point map.
        penalty: weight of the squared norm of d.
        portion: share of a batch that gets d, in (0, 1].
        lr: initial learning rate.
        optimizer: as a callable from parameters; ``None`` is Adam at ``lr``, without momentum and weight decay.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    compilable = False
    stays_in_eval_mode = True

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        iterations: int = 5,
        inner_lr: float = 10.0,
        inner_step: float = 0.1,
        penalty: float = 0.001,
        portion: float = 0.01,
        lr: float = 1e-4,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, optimizer=optimizer, warmup=warmup, **kwargs)
        check_at_least("iterations", iterations, 1)
        for name, value in {"inner_lr": inner_lr, "inner_step": inner_step, "penalty": penalty}.items():
            check_at_least(name, value, 0.0)
        check_range("portion", portion, 0.0, 1.0, open_low=True)
        self.iterations, self.inner_lr, self.inner_step = iterations, inner_lr, inner_step
        self.penalty, self.portion = penalty, portion
        # Of this round, saved with a checkpoint. No buffers: their shapes change within a fit.
        self.perturbation, self.inner_images, self.inner_labels = (torch.empty(0) for _ in range(3))

    def default_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Adam."""
        return Adam(parameters, self.lr)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a round with each epoch."""
        if batch_idx == 0:
            self._find_perturbation()

    def passes_of_step(self) -> float:
        """The outer and the inner loss, there and back; one more way back for each iteration and the last product."""
        return 5 + self.iterations

    def passes_beside(self, epochs: int, images: int, batch: int) -> dict[str, int]:
        """The perturbation of each round, over all images."""
        return {"perturbations": 3 * epochs * images}

    def _find_perturbation(self) -> None:
        """This round's perturbation, by one pass over the clean images."""
        batches, number = clean_batches(self.trainer), batches_of_an_epoch(self.trainer)
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            first = next(batches).images
            perturbation = self._ascend(torch.zeros_like(first[:1]), first)
            for _ in range(number - 1):
                perturbation = self._ascend(perturbation, next(batches).images)
        self.perturbation = perturbation
        self.inner_images = torch.empty(0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and save the round, so that a fit can go on in the middle of it."""
        super().on_save_checkpoint(checkpoint)
        if len(self.inner_images):
            names = ("perturbation", "inner_images", "inner_labels")
            checkpoint["round"] = {name: getattr(self, name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and go on with the saved round."""
        super().on_load_checkpoint(checkpoint)
        for name, value in checkpoint.get("round", {}).items():
            setattr(self, name, value)

    def _ascend(self, perturbation: Tensor, images: Tensor) -> Tensor:
        leaf = perturbation.detach().requires_grad_()
        with torch.no_grad():
            answers = predict(self.model, images).argmax(dim=1)
        loss = self._inner_loss(leaf, images, answers)
        return leaf.detach() - self.inner_lr * self.reduce(torch.autograd.grad(loss, leaf)[0])

    def _inner_loss(self, perturbation: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return self.penalty * perturbation.square().sum() - F.cross_entropy(
            predict(self.model, images + perturbation), labels
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A loss whose gradient is the hypergradient."""
        images, labels = self.unpack(batch, batch_idx)
        if not len(self.inner_images):
            self.inner_images, self.inner_labels = images, labels
        for name in ("perturbation", "inner_images", "inner_labels"):  # a checkpoint brings them back on the CPU
            setattr(self, name, getattr(self, name).to(images.device))
        generator = generator_for(
            self.seed, 7, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        number = max(1, int(self.portion * len(images)))
        chosen = torch.rand(len(images), generator=generator, device=images.device).argsort().argsort() < number
        parameters = self.trained_parameters()

        def outer(perturbation: Tensor) -> Tensor:
            patched = images + perturbation * chosen[:, None, None, None]
            return F.cross_entropy(predict(self.model, patched), labels)

        def inner_map(perturbation: Tensor) -> Tensor:
            loss = self._inner_loss(perturbation, self.inner_images, self.inner_labels)
            return perturbation - self.inner_step * torch.autograd.grad(loss, perturbation, create_graph=True)[0]

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            value, gradients = hypergradient(
                outer, inner_map, self.perturbation, parameters, self.iterations, self.reduce
            )
        self.log("train/loss", value, prog_bar=True)
        # Its gradient is `gradients`, so precision, accumulation, clipping and processes stay the Trainer's business.
        steps = [(gradient * weight).sum() for gradient, weight in zip(gradients, parameters, strict=True)]
        return torch.stack(steps).sum()


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner_map: Callable[[Tensor], Tensor],
    solution: Tensor,
    parameters: Sequence[Tensor],
    iterations: int,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[Tensor, list[Tensor]]:
    r"""Derivative of an outer loss at the fixed point :math:`d = \Phi(d, \theta)` with respect to theta.

    .. math:: v_{k+1} = (\partial_d \Phi)^\top v_k + \nabla_d L, \quad
        \nabla_\theta L + (\partial_\theta \Phi)^\top v_K

    Source: Grazzi et al., "On the iteration complexity of hypergradient computation", ICML 2020 (arXiv 2006.16218),
    algorithm 1 (fixed-point method).

    Args:
        outer: the loss as a function of d (and of ``parameters``, by closure).
        inner_map: the map whose fixed point d is, differentiable twice.
        solution: d.
        parameters: theta; each must require gradients.
        iterations: K.
        reduce: averages a tensor over all processes, each of which has the loss and the map of its own images.

    Returns:
        The loss, detached, and one gradient for each parameter.
    """
    leaf = solution.detach().requires_grad_()
    value = outer(leaf)
    direct_leaf, *direct = torch.autograd.grad(value, [leaf, *parameters], allow_unused=True, materialize_grads=True)
    mapped, direct_leaf = inner_map(leaf), reduce(direct_leaf)
    vector = torch.zeros_like(leaf)
    for _ in range(iterations):
        vector = reduce(torch.autograd.grad(mapped, leaf, vector, retain_graph=True)[0]) + direct_leaf
    indirect = torch.autograd.grad(mapped, parameters, vector, allow_unused=True, materialize_grads=True)
    return value.detach(), [first + second for first, second in zip(direct, indirect, strict=True)]
