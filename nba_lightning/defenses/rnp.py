"""Reconstructive neuron pruning."""

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from nba_lightning.callbacks.finite_loss import NonFiniteLossError
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import logits_of
from nba_lightning.core.modes import evaluating, frozen_statistics
from nba_lightning.io.batches import clean_batches, held_out_loader, plain_batches
from nba_lightning.training.evaluation import labels_of
from nba_lightning.training.neuron_masks import NeuronMasks
from nba_lightning.training.schedule import batches_of_an_epoch

_ROUND = 4
"""Batches of a round of unlearning: the authors' epoch, of 500 images at 128."""
_THRESHOLDS = tuple(step / 20 for step in range(19))
"""The authors' thresholds, 0 to 0.9."""


class RNP(NeuronMasks):
    r"""Make the network unlearn its clean images, and prune the neurons that are not needed to learn them again.

    .. math::
        \hat\theta = \arg\max_\theta CE(f_\theta(x), y), \qquad
        \min_{m \in [0, 1]^n} \alpha\, CE(f_{m \odot \hat\theta}(x), y)

    over one mask value m for each BatchNorm channel's weight. Unlearning, before the first step, goes through rounds of
    four batches and ends with the first that the network in training mode gets right on at most ``unlearned_accuracy``
    of the images; a copy is unlearned, and the fit trains the masks on it. Then the suspicious network's own channels
    are pruned in the order of their masks: those up to the highest of the thresholds 0, 0.05, ... 0.9 before which none
    costs more than ``max_drop`` of the accuracy on the images that the defender holds out (a BackdoorDataModule's
    validation part, else the fit's first validation loader, else the training images). Until then validation sees the
    suspicious network.

    Source: Li et al., "Reconstructive neuron pruning for backdoor defense", ICML 2023 (arXiv 2305.14876), as the
    authors' code has it (the text was not at hand). Unlearning by SGD at 0.01 with momentum 0.9 and weight decay 5e-4,
    at a tenth from half of its 20 rounds on; an accuracy of 0.2; alpha 0.2, masks by SGD at 0.2 for 20 epochs of 500
    images in batches of 128 are theirs, and so is that a pruned channel keeps its bias. Their code clips gradients
    before there are any, which does nothing, and is left out. Their rate of the masks is constant, ours a cosine. They
    choose the threshold by accuracy and ASR of the *test* images, a public benchmark the one with the lowest ASR within
    10 % of the accuracy; a defender cannot, so the held-out part decides here, and 4 points are our choice.

    Args:
        model: the suspicious network; it must have BatchNorm layers with weights.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        unlearning_lr: learning rate of the unlearning.
        unlearning_rounds: its rounds, at most.
        unlearned_accuracy: accuracy in a round at which it ends, in [0, 1].
        alpha: weight of the masks' loss.
        max_drop: accuracy that pruning may cost, a fraction in [0, 1].
        **kwargs: ``lr``, ``weight_decay`` and ``warmup`` of the masks, and further arguments of
            :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if the network has no BatchNorm layer with weights, or an argument is out of range.
        NonFiniteLossError: in a fit, where unlearning makes numbers infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        unlearning_lr: float = 0.01,
        unlearning_rounds: int = 20,
        unlearned_accuracy: float = 0.2,
        alpha: float = 0.2,
        max_drop: float = 0.04,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, **kwargs)
        check_range("unlearning_lr", unlearning_lr, 0.0, float("inf"), open_low=True)
        check_at_least("unlearning_rounds", unlearning_rounds, 1)
        check_range("unlearned_accuracy", unlearned_accuracy, 0.0, 1.0)
        check_range("alpha", alpha, 0.0, float("inf"), open_low=True)
        check_range("max_drop", max_drop, 0.0, 1.0)
        self.unlearning_lr, self.unlearning_rounds = unlearning_lr, unlearning_rounds
        self.unlearned_accuracy, self.alpha, self.max_drop = unlearned_accuracy, alpha, max_drop
        # By name: the unlearned network's parameters, and the suspicious BatchNorm weights. Saved with a checkpoint.
        self.unlearned: dict[str, Tensor] = {}
        self.suspicious: dict[str, Tensor] = {}

    def default_optimizer(self, parameters: Any) -> SGD:
        """SGD without Nesterov's momentum, as in the authors' code."""
        return SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)

    def on_train_start(self) -> None:
        """As usual, and unlearn, once."""
        super().on_train_start()
        if not self.unlearned:
            self.suspicious = {f"{name}.weight": self.norm(name).weight.detach().clone() for name in self.norms}
            self.unlearned = self._unlearn()
        for kept in (self.unlearned, self.suspicious):  # a checkpoint brings them back on the CPU
            kept.update({name: value.to(self.device) for name, value in kept.items()})

    def _unlearn(self) -> dict[str, Tensor]:
        """Parameters of the network after ascent on the clean images' loss."""
        trains = {id(parameter) for parameter in self._resting}
        named = {name: value for name, value in self.model.named_parameters() if id(value) in trains}
        parameters = {name: value.detach().clone().requires_grad_() for name, value in named.items()}
        optimizer = SGD(parameters.values(), self.unlearning_lr, momentum=0.9, weight_decay=5e-4)
        batches = clean_batches(self.trainer)
        for number in range(self.unlearning_rounds):
            if number == self.unlearning_rounds // 2 > 0:
                optimizer.param_groups[0]["lr"] /= 10
            steps = [self._ascend(parameters, optimizer, batch) for batch in islice(batches, _ROUND)]
            right, seen, loss = (float(self.reduce(total)) for total in torch.stack(steps).sum(dim=0))
            if not loss < float("inf"):
                raise NonFiniteLossError(
                    f"Expected a finite loss of unlearning, but got {loss / _ROUND}. Try a smaller `unlearning_lr`."
                )
            if right <= self.unlearned_accuracy * seen:
                break
        else:
            rank_zero_warn(
                f"After {self.unlearning_rounds} rounds of unlearning the network is still right on "
                f"{right / seen:.0%} of its clean images, more than `unlearned_accuracy`."
            )
        return {name: value.detach() for name, value in parameters.items()}

    def _ascend(self, parameters: dict[str, Tensor], optimizer: SGD, batch: Any) -> Tensor:
        """A step of unlearning. How many images of the batch were right, how many there were, and the loss `(3,)`."""
        labels = labels_of(batch)
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context(), frozen_statistics(self.model):
            logits = logits_of(functional_call(self.model, parameters, (batch.images,)))
            loss = F.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(-loss, list(parameters.values()), allow_unused=True)
        for value, gradient in zip(parameters.values(), gradients, strict=True):
            value.grad = None if gradient is None else self.reduce(gradient)
        optimizer.step()
        right = (logits.detach().argmax(dim=1) == labels).sum()
        return torch.stack([right.float(), torch.full_like(right, len(labels)).float(), loss.detach().float()])

    def passes_beside(self, epochs: int, images: int, batch: int) -> dict[str, int]:
        """Unlearning, if it takes all rounds, and the choice of the threshold where no images are held out."""
        unlearning = 2 * self.unlearning_rounds * _ROUND * batch
        return {"unlearning": unlearning, "the threshold": 2 * (1 + len(_THRESHOLDS)) * images}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the unlearned network under the masks."""
        images, labels = self.unpack(batch, batch_idx)
        with frozen_statistics(self.model):
            logits = self.masked(images, self.masks, parameters=self.unlearned)
        loss = self.alpha * F.cross_entropy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return loss

    @torch.no_grad()
    def prune(self) -> int:
        """Set the suspicious weights of the channels up to the chosen threshold to 0; how many those are."""
        threshold, pruned = self._threshold(), 0
        for name, mask in zip(self.norms, self.masks, strict=True):
            gone = mask <= threshold
            self.norm(name).weight.copy_(self.suspicious[f"{name}.weight"].masked_fill(gone, 0.0))
            pruned += int(gone.sum())
        total = sum(len(mask) for mask in self.masks)
        rank_zero_info(f"{pruned} of {total} channels are pruned, those with masks up to {threshold:g}.")
        return pruned

    def _threshold(self) -> float:
        """The highest threshold up to which the accuracy holds; -1 if there is none."""
        held_out = held_out_loader(self.trainer)
        accuracies = self._accuracies(self.trainer.train_dataloader if held_out is None else held_out)
        chosen = -1.0
        for threshold, accuracy in zip(_THRESHOLDS, accuracies[1:], strict=True):
            if accuracy < accuracies[0] - self.max_drop:
                break
            chosen = threshold
        return chosen

    @torch.no_grad()
    def _accuracies(self, loader: Any) -> list[float]:
        """Accuracy of the suspicious network on a loader's images: as it came, and pruned at each threshold."""
        limit = batches_of_an_epoch(self.trainer) if loader is self.trainer.train_dataloader else None
        right, seen = torch.zeros(1 + len(_THRESHOLDS), device=self.device), torch.zeros((), device=self.device)
        kept = [[(mask > threshold).to(mask.dtype) for mask in self.masks] for threshold in (-1.0, *_THRESHOLDS)]
        for batch in islice(plain_batches(self.trainer, loader), limit):
            labels = labels_of(batch)  # those of padding are -1
            with evaluating(self.model), self.trainer.precision_plugin.forward_context():
                logits = [self.masked(batch.images, factors, parameters=self.suspicious) for factors in kept]
            right += (torch.stack(logits).argmax(dim=2) == labels).sum(dim=1)
            seen += (labels >= 0).sum()
        right, seen = self.reduce(right), self.reduce(seen)
        if not bool(seen):
            raise expected("val_dataloaders", "a loader with images to decide by", "one without")
        shares: list[float] = (right / seen).tolist()
        return shares

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and save what was unlearned, so that a fit can go on."""
        super().on_save_checkpoint(checkpoint)
        if self.unlearned:
            checkpoint["unlearning"] = {"unlearned": self.unlearned, "suspicious": self.suspicious}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and go on with what was unlearned, or unlearn anew."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("unlearning", {})
        self.unlearned, self.suspicious = dict(saved.get("unlearned", {})), dict(saved.get("suspicious", {}))
