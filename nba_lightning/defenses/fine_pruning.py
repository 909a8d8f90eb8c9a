"""Fine-pruning."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.callbacks.pseudo_samples import beside, on_device
from nba_lightning.core.checks import check_range, expected
from nba_lightning.training.defense import Defense


class FinePruning(Defense):
    r"""Prune the features that clean images leave asleep, then fine-tune.

    Before the first step, the inputs of the network's last linear layer are ranked by their mean absolute activation on
    the clean images. The most dormant are cut off as long as the accuracy on the defender's validation part (the
    training images where there is none) stays within ``max_drop`` of the unpruned network's. Then all other weights are
    fine-tuned.

    Source: Liu et al., "Fine-pruning: defending against backdooring attacks on deep neural networks", RAID 2018
    (arXiv 1805.12185), sections 3.1 to 3.3. The paper prunes channels of the last convolution; behind a global pooling
    that is the same as cutting the linear layer's inputs. A public benchmark stops by *test* accuracy, at a relative
    drop of 0.1; here the validation part decides, and 4 points are
    our choice.

    Args:
        model: the suspicious network; its last linear layer takes the features.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        max_drop: accuracy that pruning may cost, a fraction in [0, 1].
        lr: initial learning rate of the fine-tuning.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if the network has no linear layer, or ``max_drop`` is out of range.
    """

    kept: Tensor
    pruned: Tensor

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        max_drop: float = 0.04,
        lr: float = 0.01,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        check_range("max_drop", max_drop, 0.0, 1.0)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise expected("model", "a network with a linear layer", type(model).__name__)
        self.max_drop, self.last = max_drop, linear[-1]
        self.register_buffer("kept", torch.ones(self._linear().in_features))
        self.register_buffer("pruned", torch.tensor(False))

    def _linear(self) -> nn.Linear:
        linear = self.model.get_submodule(self.last)
        assert isinstance(linear, nn.Linear)
        return linear

    def observed_layers(self) -> list[str]:
        """The layer whose inputs are pruned."""
        return [self.last]

    def on_train_start(self) -> None:
        """Prune, once."""
        if bool(self.pruned):  # a fit that was resumed
            return
        data = getattr(self.trainer, "datamodule", None)
        held_out = data.val_dataloader() if data is not None else None
        if isinstance(held_out, list | tuple):
            held_out = held_out[0] if held_out else None
        dormant, labels = self._features(beside(self.trainer.train_dataloader))
        features = dormant
        if held_out is not None:
            features, labels = self._features(held_out)
        order = dormant.abs().mean(dim=0).argsort()
        self.kept.copy_(keep_mask(self._linear(), features, labels, order, self.max_drop))
        self.pruned.fill_(True)
        self._cut()
        rank_zero_info(f"{int((self.kept == 0).sum())} of {len(self.kept)} features are pruned.")

    @torch.no_grad()
    def _features(self, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Inputs `(N, F)` of the last linear layer, and labels `(N,)`, of a loader's images, those of all processes."""
        caught: list[Tensor] = []
        labels: list[Tensor] = []
        hook = self._linear().register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].float()))
        training = self.model.training
        self.model.eval()
        try:
            for batch in loader:
                images, truth = self.unpack(on_device(self.trainer, batch))
                self.model(images)
                labels.append(truth)
        finally:
            hook.remove()
            self.model.train(training)
        # Each process has seen its own share of the images; all must decide alike.
        features, truths = self.all_gather((torch.cat(caught), torch.cat(labels)))
        return features.flatten(0, -2), truths.flatten()

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
