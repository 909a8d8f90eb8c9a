"""What all defences share."""

from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from nba_lightning.callbacks.cleaned_weights import CleanedWeights
from nba_lightning.callbacks.given import unless_given
from nba_lightning.io.adapters import bare
from nba_lightning.training.classifier import Classifier


class Defense(Classifier):
    """Base class of all defences: a suspicious network comes in, a cleaned one goes out.

    A subclass writes its ``training_step``. At the end of ``fit`` the cleaned weights are written beside the
    checkpoints as ``cleaned.safetensors``, with exactly the keys and dtypes of the network that came in (a
    :class:`~nba_lightning.callbacks.CleanedWeights` of your own among the Trainer's callbacks names another file).
    Strategies that shard the network (FSDP, DeepSpeed) are refused.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        **kwargs: further arguments of :class:`Classifier`.
    """

    needs_whole_network = True

    def __init__(self, model: nn.Module, weights: str | None = None, **kwargs: Any) -> None:
        super().__init__(model, weights, **kwargs)
        self.dtypes = {name: value.dtype for name, value in bare(model).state_dict().items()}

    def configure_callbacks(self) -> list[Callback]:
        """Write the cleaned weights when the fit has ended."""
        return [*super().configure_callbacks(), *unless_given(self._trainer, CleanedWeights())]
