"""What all defences share."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nba_lightning.callbacks.cleaned_weights import CleanedWeights
from nba_lightning.callbacks.given import unless_given
from nba_lightning.core.checks import expected
from nba_lightning.io.adapters import bare
from nba_lightning.training.classifier import Classifier
from nba_lightning.training.cost import cost_of
from nba_lightning.training.sweep import usual_optimizer
from nba_lightning.training.telling import tell_once


class Defense(Classifier):
    """Base class of all defences: a suspicious network comes in, a cleaned one goes out.

    A subclass writes its ``training_step``. At the end of ``fit`` the cleaned weights are written beside the
    checkpoints as ``cleaned.safetensors``, with exactly the keys and dtypes of the network that came in (a
    :class:`~nba_lightning.callbacks.CleanedWeights` of your own among the Trainer's callbacks names another file).
    A network that knows its clean images no better than chance is told: it has not got its weights, or another order
    of classes. Strategies that shard the network (FSDP, DeepSpeed) are refused, but for FSDP2 where a subclass says by
    ``needs_whole_network = False`` that its step is one plain pass: no hooks, masks, perturbed weights, second
    derivatives, copies or verification, and no look at a weight beside the pass.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        **kwargs: further arguments of :class:`Classifier`.
    """

    needs_whole_network = True
    takes_adamw = False
    """Whether AdamW stands in for SGD where no optimiser is passed."""

    network_rests = False
    """Whether the network's own weights rest during a fit, since the method trains something beside them."""

    def __init__(self, model: nn.Module, weights: str | None = None, **kwargs: Any) -> None:
        super().__init__(model, weights, **kwargs)
        self.dtypes = {name: value.dtype for name, value in bare(model).state_dict().items()}
        self._resting: list[nn.Parameter] = []

    def setup(self, stage: str) -> None:
        """As usual; weights that rest need no gradients."""
        if not self.needs_whole_network and isinstance(self.trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            what = "`ddp` or ModelParallelStrategy (FSDP2), from which whole cleaned weights can be written"
            raise expected("strategy", what, type(self.trainer.strategy).__name__)
        super().setup(stage)
        if stage == "fit" and self.network_rests and not self._resting:  # else a fit broke off
            self._resting = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.model.requires_grad_(False)

    def teardown(self, stage: str) -> None:
        """Let weights that rested train again."""
        super().teardown(stage)
        for parameter in self._resting:
            parameter.requires_grad_()
        self._resting = []

    def fit_to_network(self, rates: Mapping[str, float]) -> None:
        """Take the optimiser of the network's kind (see :func:`~nba_lightning.training.sweep.usual_optimizer`).

        Args:
            rates: learning rate with ``SGD`` and with ``AdamW``.
        """
        kind = usual_optimizer(self.model)
        self.lr, self.takes_adamw = rates[kind], kind == "AdamW"

    def default_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """SGD; AdamW for a network of its kind, where no rate was given."""
        if self.takes_adamw:
            return AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        return super().default_optimizer(parameters)

    def on_fit_start(self) -> None:
        """As usual; and say what the fit will cost."""
        super().on_fit_start()
        cost = cost_of(self)
        if cost is not None:
            rank_zero_info(f"{type(self).__name__}: {cost}.")

    def configure_callbacks(self) -> list[Callback]:
        """Write the cleaned weights when the fit has ended."""
        return [*super().configure_callbacks(), *unless_given(self._trainer, CleanedWeights())]

    def look_at_first_answers(self, logits: Tensor, labels: Tensor) -> None:
        """Tell where the network that came in knows its clean images no better than chance."""
        right, seen, chance = int((logits.argmax(dim=1) == labels).sum()), len(labels), 1 / logits.shape[1]
        if right / seen <= chance + 2 * (chance * (1 - chance) / seen) ** 0.5:
            sentence = (
                f"The suspicious network is right on {right} of the first {seen} clean images, which is no better than "
                "chance. Has it got its weights (`weights`), is the order of its classes that of the labels, and are "
                "the images normalised as it expects?"
            )
            tell_once(self, [sentence])
