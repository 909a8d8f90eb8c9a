"""What defences share that draw the last layer anew and keep it away from what it was."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from nba_lightning.core.checks import expected
from nba_lightning.core.features import predict
from nba_lightning.core.heads import check_head, find_head
from nba_lightning.core.randomness import generator_for
from nba_lightning.training.compilation import undo_compile
from nba_lightning.training.defense import Defense


class RedrawnHead(Defense):
    """Base class of defences that train the whole network from a last layer drawn anew, whose norm stays.

    The last layer is the linear one whose output is the logits; the first batch of a fit shows which that is. It is
    drawn before the first step, once in a fit, and scaled to the Frobenius norm that it came with after each step. A
    subclass writes :meth:`draw` and :meth:`loss`.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        head: module path of the last linear layer; ``None`` finds it.
        lr: initial learning rate of SGD, with momentum but not Nesterov's, as in the authors' codes.
        weight_decay: of SGD.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if the network has no linear layer, or ``head`` is none; with the first batch, if the network does
            not end in a linear layer, or its weight does not train or is 0.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        head: str | None = None,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, weight_decay=weight_decay, warmup=warmup, **kwargs)
        check_head(model, head, "model")
        self.head = head
        # Of this fit, saved with a checkpoint. No buffer: which layer it is, and so its shape, an image shows.
        self.path, self.initial = "", torch.empty(0)

    @abstractmethod
    def draw(self, layer: nn.Linear, generator: torch.Generator) -> None:
        """Draw the last layer anew, in place; the generator is a CPU's."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor, initial: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: `(B, K)`.
            labels: `(B,)`.
            weight: `(K, F)` of the last layer, float32.
            initial: `(K, F)` what it was in the suspicious network, float32.
        """

    def default_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """SGD without Nesterov's momentum."""
        return SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The subclass's loss; draws the last layer before the first step."""
        images, labels = self.unpack(batch, batch_idx)
        if not len(self.initial):
            self._begin(images)
        self.initial = self.initial.to(images.device)  # a checkpoint brings it back on the CPU
        logits = predict(self.model, images)
        loss = self.loss(logits, labels, self.layer().weight.float(), self.initial.float())
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return loss

    def layer(self) -> nn.Linear:
        """The last layer, once it is known."""
        layer = self.model.get_submodule(self.path)
        assert isinstance(layer, nn.Linear)
        return layer

    @torch.no_grad()
    def _begin(self, images: Tensor) -> None:
        shown = self.model
        if self.compile_networks:  # compiled regions hide their layers from hooks
            shown = copy.deepcopy(self.model)
            undo_compile(shown)
        self.path = find_head(shown, images[:2], self.head, "model")
        layer, weight = self.layer(), self.layer()._parameters.get("weight")
        if weight is None or not weight.requires_grad:
            got = f"one whose {self.path!r} has a weight that is frozen or computed from others"
            raise expected("model", "a network whose last layer trains", got)
        if not bool(weight.any()):
            raise expected("model", "a network whose last layer has a weight other than 0", f"0 in {self.path!r}")
        self.initial = weight.detach().clone()
        self.draw(layer, generator_for(self.seed, 10))  # of the CPU: the same draw on all devices and processes
        torch.clear_autocast_cache()  # else this pass would run on the half-precision copy of the old weight

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Bring the last layer back to its norm, before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        rescale(self.layer().weight, self.initial)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and save what the last layer was, so that a fit can go on."""
        super().on_save_checkpoint(checkpoint)
        if len(self.initial):
            checkpoint["redrawn_head"] = {"path": self.path, "initial": self.initial}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and know the last layer, or that it is still to be drawn."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("redrawn_head", {"path": "", "initial": torch.empty(0)})
        self.path, self.initial = saved["path"], saved["initial"]


@torch.no_grad()
def rescale(weight: Tensor, like: Tensor) -> None:
    """Scale ``weight`` in place to the Frobenius norm of ``like``, both of any shape."""
    weight.mul_(like.float().norm() / weight.float().norm().clamp(min=1e-12))
