"""Training a classifier, and what all defences share."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from nba_lightning.callbacks.finite_loss import FiniteLoss
from nba_lightning.callbacks.given import unless_given
from nba_lightning.core.checks import check_at_least, check_range, check_unit_range, expected, is_plain
from nba_lightning.core.features import predict
from nba_lightning.core.metrics import IGNORE_LABEL, AttackSuccessRate, RobustAccuracy
from nba_lightning.io.adapters import check_fit, unpack
from nba_lightning.io.weights import load_weights
from nba_lightning.training.compilation import compile_regions, undo_compile
from nba_lightning.training.schedule import cosine_factor

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


class Classifier(pl.LightningModule):
    """Train any network that maps images in [0, 1] to logits, on poisoned or on clean data alike.

    Training batches are ``(images, labels)``: images `(B, C, H, W)`, float, in [0, 1]; labels `(B,)`. Evaluation
    batches are the same, or ``(images, labels, targets)`` for triggered images. Logs ``train/loss``, ``train/acc``,
    and ``val/acc``, ``val/asr``, ``val/ra`` (``test/...``) as fractions.

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
        channels_last: keep the networks' weights in channels-last order, which convolutions on many devices prefer.

    Raises:
        ValueError: for an argument out of its range, weights that do not fit, or ``compile`` where the method takes
            second derivatives or replaces weights.
    """

    needs_whole_network = False
    """Whether the method works on the network beside the Trainer's own forward and backward pass."""

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
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._keep_plain_hyperparameters()
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
        self._begun = -1
        self.evaluation = nn.ModuleDict({f"{stage}_metrics": _metrics() for stage in ("val", "test")})

    def _keep_plain_hyperparameters(self) -> None:
        """Drop arguments that hold modules or callables, so that the checkpoint stays free of code.

        Those that came from a YAML are plain: Lightning's command line records their configuration. Files of weights
        are forgotten too: the checkpoint has the weights, and must load where the files are gone.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Attribute '\w+' is an instance of `nn.Module`")
            self.save_hyperparameters(logger=False)
        for name in [name for name, value in self.hparams.items() if not is_plain(value)]:
            del self.hparams[name]
        self.hparams.update(dict.fromkeys(self.hparams.keys() & {"weights", "teacher_weights"}))

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [0, 1] to logits `(B, K)`."""
        return predict(self.model, images)

    def setup(self, stage: str) -> None:
        """Check once, before any long work, that the network takes the data's images and knows their classes.

        Then bring the networks into the form that was asked for.
        """
        if self.needs_whole_network and isinstance(self.trainer.strategy, _SHARDED):
            raise expected(
                "strategy",
                f"one that keeps the whole network on each process, such as `ddp`, for {type(self).__name__}, "
                "whose hooks, perturbations or copies need all of it",
                type(self.trainer.strategy).__name__,
            )
        data = getattr(self.trainer, "datamodule", None)
        shape, classes = getattr(data, "image_shape", None), getattr(data, "num_classes", None)
        if shape is not None and classes is not None:
            check_fit(self.model, tuple(shape), int(classes))
        for network in self.networks():
            if self.channels_last:
                network.to(memory_format=torch.channels_last)
            if self.compile_networks:
                backend = self.compile_networks if isinstance(self.compile_networks, str) else None
                compile_regions(network, self.observed_layers(), backend)

    def teardown(self, stage: str) -> None:
        """Leave networks as they came, but for their weights."""
        if self.compile_networks:
            for network in self.networks():
                undo_compile(network)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        mean: Tensor = self.trainer.strategy.reduce(tensor, reduce_op="mean")
        return mean

    def networks(self) -> list[nn.Module]:
        """The network, and those that are kept beside it: ``teacher``, ``suspicious``."""
        found = (getattr(self, name, None) for name in ("model", "teacher", "suspicious"))
        return [network for network in found if isinstance(network, nn.Module)]

    def observed_layers(self) -> list[str]:
        """Module paths of the layers whose features the method looks at."""
        return []

    def begin_epoch(self) -> None:
        """What a subclass does at the start of each epoch; nothing by default."""

    def on_train_epoch_start(self) -> None:
        """Begin the epoch."""
        self._begun = self.trainer.current_epoch
        self.begin_epoch()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin the epoch here after a checkpoint from its predecessor's last step: Lightning then calls no hook."""
        if batch_idx == 0 and self._begun != self.trainer.current_epoch:
            self.on_train_epoch_start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = self.unpack(batch)
        self.check_first_batch(images, batch_idx)
        logits = predict(self.model, images)
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return loss

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images `(B, C, H, W)` in [0, 1] and labels `(B,)`; see :func:`nba_lightning.io.adapters.unpack`."""
        images, labels, *_ = unpack(batch, self.model)
        return images, labels

    def check_first_batch(self, images: Tensor, batch_idx: int) -> None:
        """Look at the values of the first batch of a fit; later batches are not read, which would cost a wait."""
        if batch_idx == 0 and self.trainer.fit_loop.epoch_loop.total_batch_idx == 0:
            check_unit_range("images", images)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch into ACC, or into ASR and RA."""
        self._count("val", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch into ACC, or into ASR and RA."""
        self._count("test", batch)

    def _count(self, stage: str, batch: Any) -> None:
        images, labels, *targets = unpack(batch, self.model)
        preds = self(images).argmax(dim=1)
        metrics = self.evaluation.get_submodule(f"{stage}_metrics")
        for name, metric in metrics.named_children():
            assert isinstance(metric, Metric)
            if (name == "acc") == bool(targets):
                continue
            metric.update(preds, labels, *targets)
            self.log(
                f"{stage}/{name}",
                metric,
                on_step=False,
                on_epoch=True,
                prog_bar=True,
                add_dataloader_idx=False,
                batch_size=len(labels),
            )

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities `(B, K)`."""
        probabilities: Tensor = self(unpack(batch, self.model)[0]).softmax(dim=1)
        return probabilities

    def configure_callbacks(self) -> list[Callback]:
        """Stop at a loss that is not finite."""
        return unless_given(self._trainer, FiniteLoss())

    def phases(self) -> list[tuple[int, float]]:
        """The optimiser step at which each phase of the learning rate ends, and its height as a factor on ``lr``."""
        total = self.trainer.estimated_stepping_batches
        if not 0 <= total < float("inf"):
            raise expected(
                "max_steps",
                "given where the loader has no length or the fit no last epoch, since the learning rate falls to 0 "
                "over the fit (or give `limit_train_batches` and `max_epochs`, or a `scheduler` to the module)",
                self.trainer.max_steps,
            )
        return [(max(1, int(total)), 1.0)]

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser steps: only the network's own parameters by default."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a cosine, or what was passed."""
        parameters = self.trained_parameters()
        if self.optimizer_factory is not None:
            optimizer = self.optimizer_factory(parameters)
        else:
            optimizer = SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
            )
        if self.scheduler_factory is not None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler_factory(optimizer)}}
        phases = self.phases()
        schedule = LambdaLR(optimizer, lambda step: cosine_factor(step, phases, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def without_attack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict without the attack that it took from the DataModule."""
    return {name: value for name, value in state.items() if not name.startswith("attack.")}


def _metrics() -> nn.ModuleDict:
    accuracy = MulticlassAccuracy(average="micro", ignore_index=IGNORE_LABEL)
    return nn.ModuleDict({"acc": accuracy, "asr": AttackSuccessRate(), "ra": RobustAccuracy()})
