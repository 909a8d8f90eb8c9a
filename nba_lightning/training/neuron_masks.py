"""What defences share that train one mask value for each BatchNorm channel, and prune by it."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from nba_lightning.core.features import logits_of
from nba_lightning.core.layers import affine_norms
from nba_lightning.training.defense import Defense


class NeuronMasks(Defense):
    """Base class of defences whose fit trains masks in [0, 1] on BatchNorm channels, from 1 on.

    The network's own weights rest until :meth:`prune`, which a subclass writes; it is called with the last step, and
    again when the fit ends.

    Args:
        model: the suspicious network; it must have BatchNorm layers with weights.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        lr: initial learning rate of the masks.
        weight_decay: of the masks.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if the network has no BatchNorm layer with weights.
    """

    compilable = False
    network_rests = True

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        lr: float = 0.2,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, weight_decay=weight_decay, warmup=warmup, **kwargs)
        self.norms = affine_norms(model)
        self.masks = nn.ParameterList(torch.ones_like(self.norm(name).weight) for name in self.norms)

    @abstractmethod
    def prune(self) -> int:
        """Set channels of the network to 0 as the masks say; how many those are. Calling it twice is as once."""

    def norm(self, name: str) -> _BatchNorm:
        """The BatchNorm layer of that path."""
        norm = self.model.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        return norm

    def trained_parameters(self) -> list[nn.Parameter]:
        """The masks alone."""
        return list(self.masks)

    def masked(
        self,
        images: Tensor,
        weights: Iterable[Tensor],
        biases: Sequence[Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits with every BatchNorm's weight and bias times these factors.

        Args:
            images: `(B, C, H, W)` in [0, 1].
            weights: one factor for each channel of each layer.
            biases: likewise; ``None`` leaves them.
            parameters: by name, what stands for the network's own.
        """
        changed = dict(parameters or {})
        for index, (name, factor) in enumerate(zip(self.norms, weights, strict=True)):
            weight, bias = (
                changed.get(f"{name}.{kind}", getattr(self.norm(name), kind)) for kind in ("weight", "bias")
            )
            changed[f"{name}.weight"] = weight.detach() * factor
            changed[f"{name}.bias"] = bias.detach() if biases is None else bias.detach() * biases[index]
        return logits_of(functional_call(self.model, changed, (images,)))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the masks in [0, 1], and prune with the last step, before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for mask in self.masks:
                mask.clamp_(0.0, 1.0)
        if self.was_last_step():
            self.prune()

    def on_train_end(self) -> None:
        """Prune where the fit ended otherwise."""
        self.prune()
