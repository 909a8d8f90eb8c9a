"""Fine-pruning."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.heads import check_head, find_head, linear_layers
from nba_lightning.core.modes import evaluating
from nba_lightning.io.batches import held_out_loader, plain_batches
from nba_lightning.training.defense import Defense
from nba_lightning.training.evaluation import labels_of
from nba_lightning.training.schedule import batches_of_an_epoch


class FinePruning(Defense):
    r"""Prune the features that clean images leave asleep, then fine-tune.

    Before the first step, the inputs of the network's last linear layer are ranked by their mean absolute activation on
    the clean images. The most dormant are cut off as long as the accuracy on the images that the defender holds out (a
    BackdoorDataModule's validation part, else the fit's first validation loader, else the training images) stays within
    ``max_drop`` of the unpruned network's. Then all other weights are fine-tuned.

    Source: Liu et al., "Fine-pruning: defending against backdooring attacks on deep neural networks", RAID 2018
    (arXiv 1805.12185), sections 3.1 to 3.3. The paper prunes channels of the last convolution; behind a global pooling
    that is the same as cutting the linear layer's inputs. A public benchmark stops by *test* accuracy, at a relative
    drop of 0.1; here the validation part decides, and 4 points are
    our choice.

    Args:
        model: the suspicious network; its last linear layer takes the features.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        max_drop: accuracy that pruning may cost, a fraction in [0, 1].
        head: module path of the last linear layer; ``None`` takes the one that was registered last.
        lr: initial learning rate of the fine-tuning.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if the network has no linear layer, ``head`` is none, or ``max_drop`` is out of range; before the
            first step, if the network does not answer with the layer's output.
    """

    kept: Tensor
    pruned: Tensor

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        max_drop: float = 0.04,
        head: str | None = None,
        lr: float = 0.01,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        check_range("max_drop", max_drop, 0.0, 1.0)
        check_head(model, head, "model")
        self.max_drop, self.last = max_drop, head if head is not None else list(linear_layers(model))[-1]
        self.register_buffer("kept", torch.ones(self._linear().in_features))
        self.register_buffer("pruned", torch.tensor(False))

    def passes_beside(self, epochs: int, images: int, batch: int) -> dict[str, int]:
        """A look at the features; of the held-out images too, of which there are fewer."""
        return {"pruning": 2 * images}

    def _linear(self) -> nn.Linear:
        linear = self.model.get_submodule(self.last)
        assert isinstance(linear, nn.Linear)
        return linear

    def observed_layers(self) -> list[str]:
        """The layer whose inputs are pruned."""
        return [self.last]

    def on_train_start(self) -> None:
        """As usual, and prune, once."""
        super().on_train_start()
        if bool(self.pruned):  # a fit that was resumed
            return
        dormant, labels = self._features(self.trainer.train_dataloader)
        held_out, features = held_out_loader(self.trainer), dormant
        if held_out is not None:
            features, labels = self._features(held_out)
        order = dormant.abs().mean(dim=0).argsort()
        self.kept.copy_(keep_mask(self._linear(), features, labels, order, self.max_drop))
        self.pruned.fill_(True)
        self._cut()
        rank_zero_info(f"{int((self.kept == 0).sum())} of {len(self.kept)} features are pruned.")

    @torch.no_grad()
    def _features(self, loader: Any) -> tuple[Tensor, Tensor]:
        """Inputs `(N, F)` of the last linear layer, and labels `(N,)`, of a loader's images, those of all processes."""
        caught: list[Tensor] = []
        labels: list[Tensor] = []
        hook = self._linear().register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].float()))
        try:
            with evaluating(self.model), self.trainer.precision_plugin.forward_context():
                for batch in islice(plain_batches(self.trainer, loader), self._limit(loader)):
                    if not labels:  # an auxiliary classifier may be registered behind the head
                        find_head(self.model, batch.images[:2], self.last)
                        caught.clear()
                    self.model(batch.images)
                    labels.append(labels_of(batch))
        finally:
            hook.remove()
        if not labels:
            raise expected("val_dataloaders", "a loader with images to decide by", "one without")
        # Each process has seen its own share of the images; all must decide alike.
        features, truths = self.all_gather((torch.cat(caught), torch.cat(labels)))
        return features.flatten(0, -2), truths.flatten()

    def _limit(self, loader: Any) -> int | None:
        """A training loader may have no end."""
        return batches_of_an_epoch(self.trainer) if loader is self.trainer.train_dataloader else None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep what was cut off at 0, before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        self._cut()

    @torch.no_grad()
    def _cut(self) -> None:
        self._linear().weight.mul_(self.kept)


@torch.no_grad()
def keep_mask(
    linear: nn.Linear, features: Tensor, labels: Tensor, order: Sequence[int] | Tensor, drop: float
) -> Tensor:
    """Cut inputs in the given order as long as the accuracy stays within ``drop`` of the start.

    Args:
        linear: the layer, F inputs.
        features: `(N, F)` its inputs.
        labels: `(N,)`; negative ones (padding) do not count.
        order: F indices, the first to be cut first.
        drop: accuracy that may be lost, a fraction.

    Returns:
        `(F,)`, 1 for inputs that stay and 0 for those that go. At least one stays.
    """
    counted = labels >= 0
    features, labels = features[counted], labels[counted]
    kept = torch.ones(features.shape[1], device=features.device)

    weight, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()

    def accuracy() -> Tensor:
        logits = nn.functional.linear(features * kept, weight, bias)
        return (logits.argmax(dim=1) == labels).float().mean()

    start = accuracy()
    for index in list(order)[:-1]:
        kept[index] = 0.0
        if accuracy() < start - drop:
            kept[index] = 1.0
            break
    return kept
