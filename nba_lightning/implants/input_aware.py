"""Training of the input-aware dynamic backdoor: classifier and trigger generator together."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nba_lightning.attacks.base import CROSS, POISONED, rows_of
from nba_lightning.attacks.input_aware import InputAware
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.implants.untriggered import untriggered_roles, without_attack
from nba_lightning.training.classifier import Classifier
from nba_lightning.training.schedule import cosine_factor


class InputAwareTraining(Classifier):
    r"""Train the mask network, then the classifier and the pattern network together.

    First ``mask_epochs`` epochs: masks of different images differ, and values above ``mask_density`` are penalised.
    Then cross-entropy on clean, triggered and cross images, with a loss that makes patterns differ as images do,
    :math:`\lambda_{div} \|x_1 - x_2\| / \|g(x_1) - g(x_2)\|`.

    The DataModule's attack must be an :class:`~nba_lightning.attacks.InputAware`, and its ``train_on`` ``untriggered``:
    the module triggers the images itself. The attack's networks travel in the checkpoint. Optimisation is manual, so
    the Trainer's gradient clipping and accumulation do not apply; under several processes take the strategy
    ``ddp_find_unused_parameters_true``, since each phase leaves a network out.

    Source: Nguyen & Tran, NeurIPS 2020 (arXiv 2010.08138), sections 3.3 and 3.4; weights, density and learning rates
    as in the authors' code (``lambda_div`` 1, ``lambda_norm`` 100, density 0.032, Adam 0.01 with betas 0.5 and 0.9),
    which trains for 25 + 575 epochs and draws poisoned images anew in each batch. Their images are normalised, so the
    masks' diversity loss measures images in units of their standard deviation.

    Args:
        model: the network.
        mask_epochs: epochs for the mask network alone, out of the Trainer's ``max_epochs``.
        generator_lr: learning rate of both generators' Adam; the pattern network's falls with the classifier's, by a
            cosine to 0 over the joint epochs (the authors step both down four times).
        lambda_div: weight of the diversity loss.
        lambda_norm: weight of the masks' density loss.
        mask_density: mask value that costs nothing.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.
    """

    needs_whole_network = True
    attack: InputAware

    def __init__(
        self,
        model: nn.Module,
        mask_epochs: int = 2,
        generator_lr: float = 0.01,
        lambda_div: float = 1.0,
        lambda_norm: float = 100.0,
        mask_density: float = 0.032,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        check_at_least("mask_epochs", mask_epochs, 0)
        check_range("generator_lr", generator_lr, 0.0, float("inf"), open_low=True)
        check_at_least("lambda_div", lambda_div, 0.0)
        check_at_least("lambda_norm", lambda_norm, 0.0)
        check_range("mask_density", mask_density, 0.0, 1.0)
        self.mask_epochs, self.generator_lr = mask_epochs, generator_lr
        self.lambda_div, self.lambda_norm, self.mask_density = lambda_div, lambda_norm, mask_density
        self.automatic_optimization = False
        self.strict_loading = False  # the checkpoint holds the attack in the DataModule's part

    def setup(self, stage: str) -> None:
        """Take the generators from the DataModule's attack."""
        super().setup(stage)
        attack = getattr(getattr(self.trainer, "datamodule", None), "attack", None)
        if not isinstance(attack, InputAware):
            raise expected("attack", "an InputAware for InputAwareTraining", type(attack).__name__)
        self.attack = attack
        attack.ready = attack.ready or stage == "fit"
        epochs = self.trainer.max_epochs
        if getattr(self.trainer, "fast_dev_run", False):
            self.mask_epochs = 0
        elif stage == "fit" and (epochs is None or epochs <= self.mask_epochs):
            raise expected("max_epochs", f"above the {self.mask_epochs} `mask_epochs`", epochs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual, but leave the attack to the DataModule, which saves and restores it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = without_attack(checkpoint["state_dict"])

    def planned_steps(self) -> int:
        """The classifier's schedule covers the epochs after the masks'."""
        total = super().planned_steps()
        masks = total * self.mask_epochs // max(1, self.trainer.max_epochs or 1)
        return max(1, total - masks)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The classifier's optimiser and schedule; Adam for each generator, the pattern's with the same cosine."""
        configured: Any = super().configure_optimizers()
        optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        pattern, mask = (
            torch.optim.Adam(network.parameters(), self.generator_lr, betas=(0.5, 0.9))
            for network in (self.attack.pattern_network, self.attack.mask_network)
        )
        # Patterns that went on moving after the classifier has come to rest would leave it behind.
        steps = self.planned_steps()
        pattern_schedule = LambdaLR(pattern, lambda step: cosine_factor(step, steps, self.warmup))
        return [optimizer, pattern, mask], [schedule, pattern_schedule]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of the mask network, or of classifier and pattern network."""
        images, labels = self.unpack(batch, batch_idx)
        roles = untriggered_roles(batch, self)
        classifier, pattern, mask = self._optimizers()
        if self.trainer.current_epoch < self.mask_epochs:
            loss = self._mask_loss(images)
            self._update(loss, mask)
        else:
            loss = self._joint_loss(images, labels, roles)
            self._update(loss, classifier, pattern)
            classifier_schedule, pattern_schedule = self._schedules()
            pattern_schedule.step()
            if self.scheduler_factory is None:
                classifier_schedule.step()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss.detach()

    def on_train_epoch_end(self) -> None:
        """A schedule that was passed steps once an epoch of the classifier."""
        if self.scheduler_factory is not None and self.trainer.current_epoch >= self.mask_epochs:
            self._schedules()[0].step()

    def _schedules(self) -> list[LRScheduler]:
        schedules = self.lr_schedulers()
        assert isinstance(schedules, list)
        return [schedule for schedule in schedules if isinstance(schedule, LRScheduler)]

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer, LightningOptimizer]:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        classifier, pattern, mask = optimizers
        return classifier, pattern, mask

    def _update(self, loss: Tensor, *optimizers: LightningOptimizer) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def _mask_loss(self, images: Tensor) -> Tensor:
        masks = self.attack.mask(images)
        density = F.relu(masks - self.mask_density).mean()
        scaled = images / images.std().clamp(min=1e-6)
        diversity = diversity_loss(scaled, scaled.roll(1, 0), masks, masks.roll(1, 0))
        return self.lambda_norm * density + self.lambda_div * diversity

    def _joint_loss(self, images: Tensor, labels: Tensor, roles: Tensor) -> Tensor:
        poisoned, cross = (rows_of(roles == role, images.device) for role in (POISONED, CROSS))
        others = images[(cross + 1) % len(images)]
        sources = torch.cat([images[poisoned], others])
        patterns = self.attack.pattern(sources)
        with torch.no_grad():
            masks = self.attack.mask(sources)
        chosen = torch.cat([poisoned, cross])
        triggered = torch.lerp(images[chosen], patterns.to(images), masks.to(images))
        inputs = images.index_copy(0, chosen, triggered)
        targets = labels.index_copy(0, poisoned, self.attack.relabel(labels[poisoned]))
        logits = predict(self.model, inputs)
        loss = F.cross_entropy(logits, targets)
        self.log("train/acc", (logits.detach().argmax(dim=1) == targets).float().mean(), prog_bar=True)
        pairs = min(len(poisoned), len(cross))
        if pairs and self.lambda_div:
            first, second = slice(0, pairs), slice(len(poisoned), len(poisoned) + pairs)
            loss = loss + self.lambda_div * diversity_loss(
                sources[first], sources[second], patterns[first], patterns[second]
            )
        return loss


def diversity_loss(first: Tensor, second: Tensor, first_out: Tensor, second_out: Tensor) -> Tensor:
    r"""Mean of :math:`\|x_1 - x_2\| / \|g(x_1) - g(x_2)\|`, both as root mean squares over an image.

    Source: Nguyen & Tran, NeurIPS 2020 (arXiv 2010.08138), equation 5.
    """
    between = (first - second).float().square().mean(dim=(1, 2, 3)).sqrt()
    # The root has no slope at 0, so two equal outputs must not reach it.
    apart = ((first_out - second_out).float().square().mean(dim=(1, 2, 3)) + 1e-12).sqrt()
    return (between / (apart + 1e-7)).mean()
