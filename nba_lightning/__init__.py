"""Remove backdoors from image classifiers by Neural Behavioral Alignment, as PyTorch Lightning parts."""

from typing import Any

from nba_lightning._moved import install
from nba_lightning.data import BackdoorDataModule, CleanImages
from nba_lightning.defenses import (
    ANP,
    BAN,
    BTIDBF,
    D3,
    FST,
    FTSAM,
    IBAU,
    NAD,
    NBA,
    NPD,
    RNP,
    SAU,
    FinePruning,
    FineTuning,
    Unlearning,
)
from nba_lightning.implants import FlattenedTraining, GrondTraining, InputAwareTraining, SCARTraining, Steganography
from nba_lightning.io.adapters import Normalized
from nba_lightning.io.batches import Batch
from nba_lightning.io.weights import load_weights
from nba_lightning.training import Classifier, Defense

install()

__version__ = "0.6.0"
__all__ = [
    "ANP",
    "BAN",
    "BTIDBF",
    "D3",
    "FST",
    "FTSAM",
    "IBAU",
    "NAD",
    "NBA",
    "NPD",
    "RNP",
    "SAU",
    "BackdoorDataModule",
    "Batch",
    "Classifier",
    "CleanImages",
    "Defense",
    "FinePruning",
    "FineTuning",
    "FlattenedTraining",
    "GrondTraining",
    "InputAwareTraining",
    "Normalized",
    "SCARTraining",
    "Steganography",
    "Unlearning",
    "clean",
    "load_weights",
]


def __getattr__(name: str) -> Any:
    """The command ``clean`` in Python; imported when it is asked for, since it needs all else."""
    if name != "clean":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nba_lightning.app.clean import clean

    return clean
