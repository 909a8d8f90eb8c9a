"""Unlearning what a generator of triggers finds outside the benign features."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import changed, features, predict
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.layers import resolve_layers
from nba_lightning.core.modes import evaluating
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.batches import Batch, clean_batches
from nba_lightning.networks.u_net import UNet
from nba_lightning.training.classifier import OptimizerFactory
from nba_lightning.training.compilation import undo_compile
from nba_lightning.training.defense import Defense
from nba_lightning.training.evaluation import labels_of
from nba_lightning.training.schedule import batches_of_an_epoch

UNIT = 0.2
"""Standard deviation of the authors' images; they measure distances and noise in units of it."""


@dataclass
class Inversion:
    """What was found of the trigger; saved with a checkpoint, so that a fit goes on with it.

    Attributes:
        generator: draws what it adds to an image.
        optimizer: of the generator, over all rounds.
        target: the class that the first round found; -1 before.
    """

    generator: UNet
    optimizer: Adam
    target: int = -1

    def __call__(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` with what should be a trigger; values may leave [0, 1]."""
        added: Tensor = self.generator((images.float() - 0.5) / UNIT)
        return (images + UNIT * added).to(images.dtype)


class BTIDBF(Defense):
    r"""Find what lies outside the benign features, let a generator make it, and unlearn it: BTI-DBF (U).

    Every round first divides the features s(x) of a layer by a mask m in [0, 1] for each of their values,

    .. math:: \min_m \; CE(h(m \odot s(x)), y) - CE(h((1 - m) \odot s(x)), y),

    h being the rest of the network, then trains a generator G of images, within a distance, by

    .. math::
        \min_G \; - \| (1 - m) \odot (s(x) - s(G(x))) \|^2 + 0.01 \| m \odot (s(x) - s(G(x))) \|^2 + CE(f(G(x)), t)

    whose last term, with the class t that most generated images of the first round become, begins with the second
    round. Where a mean distance of images or of benign features is above its bound, the distance of images is
    minimised instead. The epochs that follow unlearn: with a tenth of each batch generated, z, the network minimises

    .. math:: CE(f(z), y) + \| s(x) - s(z) \|^2

    where all squared norms are means over values.

    Source: Xu et al., "Towards reliable and efficient backdoor trigger inversion via decoupling benign features", ICLR
    2024, section 3, equations 1 and 2 and its defence (U), and the authors' code (``btidbfu.py``), whose settings for
    CIFAR-10 on ResNet-18 these are: five rounds of 20 epochs for the mask (Adam at 0.01), 30 for the generator (Adam
    at 1e-3) and 30 to unlearn (Adam at 1e-4), batches of 128, bounds 0.3 on images and 3 on features, s all
    convolutions. As there, the mask sees the network in the mode in which it trains, the generator sees it in ``eval``
    mode, and generated images may leave [0, 1]; distances of images are in units of the standard deviation there.

    Theirs is a U-Net that they train for 50 epochs beforehand to give back its input; ours, a U-Net of the same widths,
    adds what it draws to the image and needs no such training. There the rate is constant; here a cosine falls to 0, as
    for all defences.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        layer: module path of the layer whose output s is; ``None`` takes the last of
            :func:`nba_lightning.core.layers.default_layers`.
        round_epochs: epochs of unlearning in a round; as many rounds as the fit's epochs hold.
        mask_epochs: passes over the clean images for the mask of each round.
        generator_epochs: passes for the generator in each round.
        mask_lr: rate of the mask.
        generator_lr: rate of the generator.
        generator_width: channels of the generator's first stage.
        image_bound: bound on the mean squared distance of generated images.
        feature_bound: bound on that of their benign features.
        lr: initial learning rate of unlearning.
        optimizer: as a callable from parameters; ``None`` is Adam at ``lr``, without momentum and weight decay.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: for an unknown layer, or an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        layer: str | None = None,
        round_epochs: int = 30,
        mask_epochs: int = 20,
        generator_epochs: int = 30,
        mask_lr: float = 0.01,
        generator_lr: float = 1e-3,
        generator_width: int = 32,
        image_bound: float = 0.3,
        feature_bound: float = 3.0,
        lr: float = 1e-4,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, optimizer=optimizer, warmup=warmup, **kwargs)
        counts = {"round_epochs": round_epochs, "mask_epochs": mask_epochs, "generator_epochs": generator_epochs}
        for name, value in (counts | {"generator_width": generator_width}).items():
            check_at_least(name, value, 1)
        for name, bound in {"mask_lr": mask_lr, "generator_lr": generator_lr, "image_bound": image_bound}.items():
            check_range(name, bound, 0.0, float("inf"), open_low=True)
        check_at_least("feature_bound", feature_bound, 0.0)
        self.layer = resolve_layers(model, None if layer is None else [layer])[-1]
        self.round_epochs, self.mask_epochs, self.generator_epochs = round_epochs, mask_epochs, generator_epochs
        self.mask_lr, self.generator_lr, self.generator_width = mask_lr, generator_lr, generator_width
        self.image_bound, self.feature_bound = image_bound, feature_bound
        # No submodule: its shape is known with the first images only, and neither averaging nor DDP is to see it.
        self.inversion: Inversion | None = None
        self._saved: dict[str, Any] | None = None

    def observed_layers(self) -> list[str]:
        """The layer whose output is divided."""
        return [self.layer]

    def default_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Adam."""
        return Adam(parameters, self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and save the generator, so that a fit can go on in the middle of a round."""
        super().on_save_checkpoint(checkpoint)
        if self.inversion is not None:
            parts = {name: getattr(self.inversion, name).state_dict() for name in ("generator", "optimizer")}
            checkpoint["inversion"] = {**parts, "target": self.inversion.target}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and go on with the saved generator."""
        super().on_load_checkpoint(checkpoint)
        self.inversion, self._saved = None, checkpoint.get("inversion")

    def _found(self, images: Tensor) -> Inversion:
        """The inversion so far, or one that begins; its generator fits the images."""
        if self.inversion is None:
            _, channels, height, width = images.shape
            drawn = generator_for(self.seed, 16, device=images.device)
            generator = UNet((channels, height, width), self.generator_width, drawn)
            self.inversion = Inversion(generator, Adam(generator.parameters(), self.generator_lr))
            if self._saved is not None:
                self.inversion.generator.load_state_dict(self._saved["generator"])
                self.inversion.optimizer.load_state_dict(self._saved["optimizer"])
                self.inversion.target = self._saved["target"]
            self._saved = None
        return self.inversion

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a round. Not in an epoch hook, which a fit that goes on from an epoch's end does not get."""
        epoch = self.trainer.current_epoch
        if batch_idx or epoch % self.round_epochs:
            return
        if epoch == 0:
            self.inversion = self._saved = None  # of an earlier fit
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            self._invert(clean_batches(self.trainer), batches_of_an_epoch(self.trainer))

    def _invert(self, batches: Iterator[Batch], number: int) -> None:
        """Divide the features, then train the generator; ``number`` batches are an epoch."""
        network = copy.deepcopy(self.model).requires_grad_(False)  # whose statistics the mask's passes may move
        undo_compile(network)
        mask = self.decouple(network, batches, self.mask_epochs * number)
        network.eval()
        for _ in range(self.generator_epochs * number):
            images = next(batches).images
            found = self._found(images)
            self._step(found.optimizer, self.inversion_loss(network, images, mask))
        if found.target < 0:
            found.target = self._likeliest_target(batches, number)

    def decouple(self, network: nn.Module, batches: Iterator[Batch], steps: int) -> Tensor:
        """The mask `(1, ...)` of benign features, values in [0, 1].

        Args:
            network: a copy that may change its statistics.
            batches: clean images and their labels.
            steps: how many.
        """
        raw = torch.empty(0)
        for step in range(steps):
            batch = next(batches)
            if step == 0:
                shape = features(network, batch.images, [self.layer])[1][self.layer].shape[1:]
                generator = generator_for(self.seed, 17, self.trainer.current_epoch, device=self.device)
                raw = torch.randn((1, *shape), generator=generator, device=self.device, dtype=torch.float32)
                raw.requires_grad_()
                optimizer = Adam([raw], self.mask_lr)
            self._step(optimizer, self.mask_loss(network, batch.images, labels_of(batch), raw.tanh() / 2 + 0.5))
        return raw.detach().tanh() / 2 + 0.5

    def mask_loss(self, network: nn.Module, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy with the features under the mask, less that with the others."""
        kept, rest = (self._masked(network, images, factor) for factor in (mask, 1 - mask))
        return F.cross_entropy(kept, labels) - F.cross_entropy(rest, labels)

    def _masked(self, network: nn.Module, images: Tensor, factor: Tensor) -> Tensor:
        """Logits `(B, K)` with the layer's output times a factor."""
        with changed(network, self.layer, lambda found: found * factor.to(found.dtype)):
            return predict(network, images)

    def inversion_loss(self, network: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
        """What the generator minimises.

        Args:
            network: the network, in ``eval`` mode.
            images: `(B, C, H, W)`, clean, in [0, 1].
            mask: `(1, ...)` of benign features.
        """
        found = self._found(images)
        generated = found(images)
        with torch.no_grad():
            wanted = features(network, images, [self.layer])[1][self.layer].float()
        logits, observed = features(network, generated, [self.layer])
        apart = wanted - observed[self.layer].float()
        benign, other = ((factor * apart).square().mean() for factor in (mask, 1 - mask))
        distance = ((images - generated).float() / UNIT).square().mean()
        far = (self.reduce(distance.detach()) > self.image_bound) | (self.reduce(benign.detach()) > self.feature_bound)
        loss = torch.where(far, distance, 0.01 * benign - other)
        if found.target < 0:
            return loss
        return loss + F.cross_entropy(logits, torch.full_like(logits[:, 0], found.target, dtype=torch.long))

    def _step(self, optimizer: Optimizer, loss: Tensor) -> None:
        """One step of something beside the network, the same on all processes."""
        parameters = optimizer.param_groups[0]["params"]
        for parameter, slope in zip(parameters, torch.autograd.grad(GRADIENT_SCALE * loss, parameters), strict=True):
            parameter.grad = self.reduce(slope) / GRADIENT_SCALE
        optimizer.step()
        torch.clear_autocast_cache()  # else the next pass would run on the half-precision copies of the old weights

    @torch.no_grad()
    def _likeliest_target(self, batches: Iterator[Batch], number: int) -> int:
        """The class that most generated images become."""
        counts = list[Tensor]()
        drawn = generator_for(self.seed, 18, self.trainer.global_rank, device=self.device)
        with evaluating(self.model):
            for _ in range(number):
                images = next(batches).images
                noise = torch.randn(images.shape, generator=drawn, device=images.device).to(images.dtype)
                logits = predict(self.model, self._found(images)(images + 0.03 * UNIT * noise))
                counts.append(F.one_hot(logits.argmax(dim=1), logits.shape[1]).float().sum(dim=0))
        return int(self.reduce(torch.stack(counts).sum(dim=0)).argmax())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy with a tenth of the images generated, and the distance of features."""
        images, labels = self.unpack(batch, batch_idx)
        keys = (self.trainer.global_rank, self.trainer.current_epoch, batch_idx)
        drawn = generator_for(self.seed, 19, *keys, device=images.device)
        chosen = torch.randperm(len(images), generator=drawn, device=images.device)[: len(images) // 10 + 1]
        mixed = images.clone()
        with torch.no_grad():
            mixed[chosen] = self._found(images)(images[chosen])
        wanted = features(self.model, images, [self.layer])[1][self.layer]
        logits, observed = features(self.model, mixed, [self.layer])
        apart = F.mse_loss(wanted.float(), observed[self.layer].float())
        loss = F.cross_entropy(logits, labels) + apart
        self.log("train/features", apart)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        self.log("train/loss", loss, prog_bar=True)
        return loss
