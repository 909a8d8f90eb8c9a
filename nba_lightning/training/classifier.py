"""Training a classifier."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nba_lightning.callbacks.finite_loss import FiniteLoss
from nba_lightning.callbacks.given import unless_given
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import Frozen, begin_training, check_finite, evaluating
from nba_lightning.io.adapters import check_fit
from nba_lightning.io.batches import as_batch, check_values
from nba_lightning.io.weights import load_weights
from nba_lightning.training.compilation import compile_regions, undo_compile
from nba_lightning.training.cost import passes_of_crafting, passes_of_verification
from nba_lightning.training.evaluation import Evaluation, labels_of
from nba_lightning.training.layout import advise_half_precision, arrange, restore
from nba_lightning.training.parts import check_same_parts, describe_parts, keep_plain_hyperparameters
from nba_lightning.training.schedule import cosine_factor
from nba_lightning.training.sharding import prepare_sharding
from nba_lightning.training.telling import tell_once

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class Classifier(Evaluation):
    """Train any network that maps images in [0, 1] to logits, on poisoned or on clean data alike.

    Training batches are ``(images, labels)``: images `(B, C, H, W)`, float, in [0, 1]; labels `(B,)`. Logs
    ``train/loss`` and ``train/acc``; how it is evaluated says :class:`~nba_lightning.training.evaluation.Evaluation`.

    A network that arrives in ``eval`` mode trains in ``train`` mode; layers in ``eval`` mode within it, and parameters
    without gradients, stay as they are. Both are told by name.

    Args:
        model: the network.
        weights: a file with its weights (see :func:`nba_lightning.io.weights.read_state_dict`).
        lr: initial learning rate of SGD (Nesterov momentum), with a cosine to 0 over the fit.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD.
        warmup: share of the steps over which the learning rate rises linearly.
        optimizer: another optimiser, as a callable from parameters; then ``lr``, ``momentum`` and ``weight_decay``
            are not used.
        scheduler: another schedule, as a callable from the optimiser, stepped once an epoch.
        seed: seed of the module's own random draws.
        compile: compile the networks by ``torch.compile`` while fitting and testing; a string names its backend.
        channels_last: whether the networks' weights are brought into channels-last order; ``None`` does so while
            it fits or is tested, where that is faster, by :mod:`nba_lightning.training.layout`.

    Raises:
        ValueError: for an argument out of its range, weights that do not fit, or ``compile`` where the method takes
            second derivatives or replaces weights; at ``setup`` for weights that are not finite, a network of which
            nothing trains, or one that does not fit the data.
    """

    needs_whole_network = False
    """Whether the method works on the network beside the Trainer's own forward and backward pass.

    One that does not can be sharded (:mod:`nba_lightning.training.sharding`).
    """

    stays_in_eval_mode = False
    """Whether the method trains the network in ``eval`` mode."""

    compilable = True
    """Whether ``torch.compile`` can do the method's arithmetic."""

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup: float = 0.1,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        seed: int = 0,
        compile: bool | str = False,  # noqa: A002
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        keep_plain_hyperparameters(self)
        check_range("lr", lr, 0.0, float("inf"), open_low=True)
        check_range("momentum", momentum, 0.0, 1.0, open_high=True)
        check_at_least("weight_decay", weight_decay, 0.0)
        check_range("warmup", warmup, 0.0, 1.0, open_high=True)
        if compile and not self.compilable:
            raise expected("compile", f"false for {type(self).__name__}, which torch.compile cannot follow", compile)
        if weights is not None:
            load_weights(model, weights)
        self.model = model
        self.lr, self.momentum, self.weight_decay, self.warmup = lr, momentum, weight_decay, warmup
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.seed, self.compile_networks, self.channels_last = seed, compile, channels_last
        self._arranged: list[nn.Module] = []

    def setup(self, stage: str) -> None:
        """Check once, before any long work, that the network can do what is asked of it.

        Then bring the networks into the form that was asked for.
        """
        sharded = prepare_sharding(self)
        data = getattr(self.trainer, "datamodule", None)
        shape, classes = getattr(data, "image_shape", None), getattr(data, "num_classes", None)
        if shape is not None and classes is not None:
            check_fit(self.model, tuple(shape), int(classes))
        if stage == "fit":
            tell_once(self, begin_training(self.model, tell_modes=not self.stays_in_eval_mode))
            check_finite(self.model, "model")
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                raise expected("model", "a network with parameters that train", "one with `requires_grad=False` on all")
            for frozen in self.frozen().values():
                frozen.fingerprint()  # now, before the Trainer's precision changes the weights
        device, precision = self.trainer.strategy.root_device, str(self.trainer.precision)
        if self.channels_last is None:
            restore(self._arranged)  # of a run that broke off
            if not sharded:  # FSDP2 takes weights in the usual order alone
                self._arranged = arrange(self.networks(), device, precision, shape, tell=stage == "fit")
        if stage == "fit":
            advise_half_precision(device, precision)
        for network in self.networks():
            if self.channels_last:
                network.to(memory_format=torch.channels_last)
            if self.compile_networks:
                backend = self.compile_networks if isinstance(self.compile_networks, str) else None
                compile_regions(network, self.observed_layers(), backend)

    def teardown(self, stage: str) -> None:
        """Leave networks as they came, but for their weights."""
        restore(self._arranged)
        self._arranged = []
        if self.compile_networks:
            for network in self.networks():
                undo_compile(network)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        mean: Tensor = self.trainer.strategy.reduce(tensor, reduce_op="mean")
        return mean

    def frozen(self) -> dict[str, Frozen]:
        """The networks beside the model that must not change, by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, Frozen)}

    def networks(self) -> list[nn.Module]:
        """The network, and those that are kept beside it."""
        return [self.model, *(frozen.network for frozen in self.frozen().values())]

    def passes_of_step(self) -> float:
        """How often each image of a batch goes through a network, forwards or backwards."""
        return 2 + len(self.frozen())

    def passes_beside(self, epochs: int, images: int, batch: int) -> dict[str, int]:
        """Passes of a fit beside its steps, by what they are for; of what is not known before, the most.

        Args:
            epochs: of the fit.
            images: of an epoch.
            batch: images of a step.
        """
        crafting = passes_of_crafting(self, epochs, images, batch)
        return {"crafting": crafting, "verification": passes_of_verification(self, images)}

    def observed_layers(self) -> list[str]:
        """Module paths of the layers whose features the method looks at."""
        return []

    def on_fit_start(self) -> None:
        """Write the plain hyperparameters into the loggers' files."""
        decided = {} if self.channels_last is not None else {"channels_last": bool(self._arranged)}
        for logger in self.trainer.loggers:
            logger.log_hyperparams(dict(self.hparams) | decided)

    def on_train_start(self) -> None:
        """Bring the network into the mode in which it trains; Lightning leaves modes as they came."""
        if self.stays_in_eval_mode:
            self.model.eval()

    def train(self, mode: bool = True) -> "Classifier":
        """As usual, but for a network that stays in ``eval`` mode."""
        super().train(mode)
        if self.stays_in_eval_mode:
            self.model.eval()
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = self.unpack(batch, batch_idx)
        logits = predict(self.model, images)
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return loss

    def unpack(self, batch: Any, batch_idx: int | None = None) -> tuple[Tensor, Tensor]:
        """Images `(B, C, H, W)` in [0, 1] and labels `(B,)` of a batch to learn from.

        The values of the first batch of a fit are looked at; later ones are not read, which would cost a wait.
        """
        found = as_batch(batch, self.model)
        if batch_idx == 0 and self.trainer.fit_loop.epoch_loop.total_batch_idx == 0:
            with torch.no_grad(), evaluating(self.model):
                logits = predict(self.model, found.images)
            check_values(batch, self.model, logits.shape[1])
            self.look_at_first_answers(logits, labels_of(found))
        return found.images, labels_of(found)

    def look_at_first_answers(self, logits: Tensor, labels: Tensor) -> None:
        """What a subclass has to say of the network's answers `(B, K)` before the first step; nothing by default."""

    def configure_callbacks(self) -> list[Callback]:
        """Stop at a loss that is not finite."""
        return unless_given(self._trainer, FiniteLoss())

    def planned_steps(self) -> int:
        """Optimiser steps of the whole fit.

        Raises:
            ValueError: where the fit has no end.
        """
        total = self.trainer.estimated_stepping_batches
        if not 0 <= total < float("inf"):
            raise expected(
                "max_steps",
                "given where the loader has no length or the fit no last epoch, since the learning rate falls to 0 "
                "over the fit (or give `limit_train_batches` and `max_epochs`, or a `scheduler` to the module)",
                self.trainer.max_steps,
            )
        return max(1, int(total))

    def was_last_step(self) -> bool:
        """Within ``optimizer_step``, after the step: whether it was the fit's last one."""
        finished: bool = self.trainer.global_step + 1 == self.trainer.estimated_stepping_batches  # counted afterwards
        return finished

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser steps: only the network's own parameters by default."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def default_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """The optimiser where none is passed: SGD."""
        nesterov = self.momentum > 0
        return SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=nesterov)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with a cosine, or what was passed."""
        make = self.optimizer_factory or self.default_optimizer
        optimizer = make(self.trained_parameters())
        if self.scheduler_factory is not None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler_factory(optimizer)}}
        steps = self.planned_steps()
        schedule = LambdaLR(optimizer, lambda step: cosine_factor(step, steps, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the parts are, and which frozen networks stood beside; not their weights, which do not change."""
        checkpoint["parts"] = describe_parts(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the parts with those of the saved module."""
        check_same_parts(self, checkpoint.get("parts", {}))
