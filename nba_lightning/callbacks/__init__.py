"""Callbacks: regenerating pseudo samples, the cleaned weights, the loss that must be finite, the guard, records."""

from nba_lightning.callbacks.cleaned_weights import CleanedWeights
from nba_lightning.callbacks.finite_loss import FiniteLoss, NonFiniteLossError
from nba_lightning.callbacks.guard import Guard, RejectedError
from nba_lightning.callbacks.history import History
from nba_lightning.callbacks.predictions import PredictionWriter
from nba_lightning.callbacks.pseudo_samples import PseudoSampleRegeneration

__all__ = [
    "CleanedWeights",
    "FiniteLoss",
    "Guard",
    "History",
    "NonFiniteLossError",
    "PredictionWriter",
    "PseudoSampleRegeneration",
    "RejectedError",
]
