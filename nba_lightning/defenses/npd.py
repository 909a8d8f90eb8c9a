"""Neural polarizer: one linear layer in a frozen network, folded into its weights."""

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import logits_of
from nba_lightning.core.folding import folded_shift, folded_weight, resolve_seam
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.modes import evaluating
from nba_lightning.io.batches import plain_batches
from nba_lightning.training.defense import Defense
from nba_lightning.training.schedule import batches_of_an_epoch


class NPD(Defense):
    r"""Train a linear layer, the polarizer, in front of one layer of the frozen network, to filter triggers out.

    The polarizer is a 1x1 convolution with BatchNorm, :math:`P(u) = \gamma (W u - \mu) / \sigma + \beta`, from the
    identity W. Each step looks for perturbations d within a Euclidean norm that lead the polarised network g to the
    likeliest wrong class :math:`t = \arg\max_{k \ne y} g_k(x)`, then minimises

    .. math::
        \lambda_1 CE(g(x), y) + \lambda_2 CE(g(x + d), \hat y) - \lambda_3 \log (1 - g_{k^*}(x + d))
        - \lambda_4 \log (1 - g_t(x + d))

    over W, gamma and beta, where :math:`\hat y` is what g says of x and k* the likeliest wrong class of x + d.

    Source: Zhu et al., "Neural polarizer: a lightweight and effective backdoor defense via purifying poisoned
    features", NeurIPS 2023 (arXiv 2306.16697), and the authors' code in a public benchmark
    (``defense/npd.py``), whose settings for CIFAR-10 on PreActResNet-18 these are: lambda 1, 0.4, 0.4 and 0.4, two
    signed steps of 0.1 from 0 in the norm of 3, which end where more than 60 % of the images are led astray, SGD at
    0.01 over 50 epochs in batches of 128, ``eval`` mode throughout, in front of ``layer4.1.conv1``.

    Ours differs in three things. The polarizer is folded into the weights, so that the network keeps its keys: it
    works on the layer's zero-padded input, theirs on the input before padding, which no convolution can express at
    its borders; and its shift goes into the layer's bias or the BatchNorm behind it. Five epochs at a rate of 1e-4,
    by which theirs begins, move W by next to nothing and give mu and sigma their values; here these are those of the
    clean images, measured before the first step. There images are not augmented, the rate is constant and momentum
    plain; here the loader's augmentation holds, and a cosine falls to 0 with Nesterov momentum, as for all defences.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        layer: module path of the layer behind the polarizer: a convolution or a linear layer that has a bias or is
            followed by BatchNorm; ``None`` takes the last such convolution.
        bound: Euclidean norm of a perturbation of one image with values in [0, 1].
        steps: gradient steps for each batch.
        step_size: length of a step in each value.
        clean: weight lambda_1.
        perturbed: weight lambda_2.
        wrong: weight lambda_3.
        target: weight lambda_4.
        lr: initial learning rate.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if no polarizer can be folded into ``layer``, with the layers that can take one; for an argument
            out of range; when the fit starts, if something else than the BatchNorm follows the layer.
    """

    compilable = False
    network_rests = True
    stays_in_eval_mode = True

    own_weight: Tensor
    own_bias: Tensor
    measured: Tensor

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        layer: str | None = None,
        bound: float = 3.0,
        steps: int = 2,
        step_size: float = 0.1,
        clean: float = 1.0,
        perturbed: float = 0.4,
        wrong: float = 0.4,
        target: float = 0.4,
        lr: float = 0.01,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        check_range("bound", bound, 0.0, float("inf"))
        check_at_least("steps", steps, 1)
        named = {"step_size": step_size, "clean": clean, "perturbed": perturbed, "wrong": wrong, "target": target}
        for name, value in named.items():
            check_at_least(name, value, 0.0)
        self.bound, self.steps, self.step_size = bound, steps, step_size
        self.clean, self.perturbed, self.wrong, self.target = clean, perturbed, wrong, target
        self.seam = resolve_seam(model, layer)
        weight = model.get_parameter(self.seam.weight).detach()
        self.polarizer = Polarizer(weight)
        # What the network came with: the polarizer is folded into these, not into what an earlier step left.
        self.register_buffer("own_weight", weight.clone())
        self.register_buffer("own_bias", model.get_parameter(self.seam.bias).detach().clone())
        self.register_buffer("measured", torch.tensor(False))

    def trained_parameters(self) -> list[nn.Parameter]:
        """The polarizer alone."""
        return list(self.polarizer.parameters())

    def on_train_start(self) -> None:
        """As usual, and measure what reaches the polarizer, once."""
        super().on_train_start()
        if not bool(self.measured):  # else the fit was resumed
            self._measure()
            self.measured.fill_(True)
            self._write()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As usual; and fold the polarizer into the network, before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for name, value in self.folded().items():
            self.model.get_parameter(name).copy_(value)

    def folded(self) -> dict[str, Tensor]:
        """The weight and the bias, by name, of the network with the polarizer as it is; gradients reach it."""
        matrix, shift = self.polarizer.affine()
        bias = self.seam.shifted(self.model, self.own_bias, folded_shift(self.own_weight, shift))
        return {self.seam.weight: folded_weight(self.own_weight, matrix), self.seam.bias: bias}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The four terms, on images without and with perturbations."""
        images, labels = self.unpack(batch, batch_idx)
        changed = self.folded()
        logits = logits_of(functional_call(self.model, changed, (images,)))
        answers, targets = logits.detach().argmax(dim=1), likeliest_wrong(logits.detach(), labels)
        perturbed = (images + self.craft(images, targets, changed)).clamp(0.0, 1.0)
        led = logits_of(functional_call(self.model, changed, (perturbed,)))
        terms = {
            "clean": self.clean * F.cross_entropy(logits, labels),
            "perturbed": self.perturbed * F.cross_entropy(led, answers),
            "wrong": self.wrong * unlikely(led, likeliest_wrong(led.detach(), labels)),
            "target": self.target * unlikely(led, targets),
        }
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        self.log("train/acc", (answers == labels).float().mean(), prog_bar=True)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def craft(self, images: Tensor, targets: Tensor, changed: dict[str, Tensor]) -> Tensor:
        """Perturbations `(B, C, H, W)` that lead the polarised network to the targets.

        Args:
            images: `(B, C, H, W)`, clean, in [0, 1].
            targets: `(B,)` the classes to lead to.
            changed: what :meth:`folded` gave.
        """
        held = {name: value.detach() for name, value in changed.items()}
        perturbations = torch.zeros_like(images)
        for step in range(self.steps):
            leaf = perturbations.detach().requires_grad_()
            logits = logits_of(functional_call(self.model, held, ((images + leaf).clamp(0.0, 1.0),)))
            gradient = torch.autograd.grad(GRADIENT_SCALE * F.cross_entropy(logits, targets), leaf)[0]
            moved = within(leaf.detach() - self.step_size * gradient.sign(), self.bound)
            if step > 0:  # what was reached after the step before
                enough = self.reduce((logits.argmax(dim=1) == targets).float().mean()) > 0.6
                moved = torch.where(enough, leaf.detach(), moved)
            perturbations = moved
        return perturbations

    @torch.no_grad()
    def _measure(self) -> None:
        """Mean and variance of what reaches the polarizer, over the clean images of all processes."""
        layer, found = self.model.get_submodule(self.seam.layer), list[tuple[Tensor, Tensor, Tensor]]()

        def look(_: nn.Module, inputs: Any) -> None:
            rows = inputs[0].float().movedim(1 if isinstance(layer, nn.Conv2d) else -1, -1).flatten(0, -2)
            variance, mean = torch.var_mean(rows, dim=0, correction=0)
            found.append((mean.new_tensor(len(rows)), mean, variance))

        batches = plain_batches(self.trainer, self.trainer.train_dataloader)
        with evaluating(self.model), self.trainer.precision_plugin.forward_context():
            for index, batch in enumerate(islice(batches, batches_of_an_epoch(self.trainer))):
                if index == 0:
                    self.seam.check(self.model, batch.images)
                hook = layer.register_forward_pre_hook(look)
                self.model(batch.images)
                hook.remove()
        if not found:
            raise expected("layer", "one that the network's forward pass calls", repr(self.seam.layer))
        rows, means, variances = (torch.stack(values) for values in zip(*found, strict=True))
        shares = (rows / rows.sum())[:, None]
        mean = self.reduce((shares * means).sum(dim=0))
        self.polarizer.mean.copy_(mean)
        self.polarizer.variance.copy_(self.reduce((shares * (variances + (means - mean).square())).sum(dim=0)))


class Polarizer(nn.Module):
    """A linear map of C channels with a scale and a shift, from the identity.

    Args:
        weight: of the layer behind it, `(O, C, ...)`, of which it takes the number of channels, device and dtype.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        channels = weight.shape[1]
        self.matrix = nn.Parameter(torch.eye(channels).to(weight))
        self.scale = nn.Parameter(torch.ones(channels).to(weight))
        self.shift = nn.Parameter(torch.zeros(channels).to(weight))
        self.register_buffer("mean", torch.zeros(channels).to(weight))
        self.register_buffer("variance", torch.ones(channels).to(weight))

    def affine(self) -> tuple[Tensor, Tensor]:
        """A matrix `(C, C)` and a shift `(C,)`, with the statistics in them."""
        factor = self.scale * (self.variance + 1e-5).rsqrt()
        return factor[:, None] * self.matrix, self.shift - factor * self.mean


def likeliest_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class `(B,)` other than the label, of logits `(B, K)`."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)


def unlikely(logits: Tensor, classes: Tensor) -> Tensor:
    r"""The mean of :math:`-\log (1.0001 - p_k)` for logits `(B, K)` and classes `(B,)` that should not be answered."""
    probabilities = logits.float().softmax(dim=1).gather(1, classes[:, None])
    return -(1.0001 - probabilities).log().mean()


def within(perturbations: Tensor, bound: float) -> Tensor:
    """Each perturbation of `(B, C, H, W)` shortened to a Euclidean norm of at most ``bound``."""
    norms = perturbations.float().flatten(1).norm(dim=1).clamp(min=1e-12)
    factors: Tensor = (bound / norms).clamp(max=1.0).view(-1, 1, 1, 1)
    return perturbations * factors.to(perturbations.dtype)
