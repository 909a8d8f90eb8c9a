"""Remove backdoors from image classifiers by Neural Behavioral Alignment, as PyTorch Lightning parts."""

from nba_lightning.data import BackdoorDataModule
from nba_lightning.defenses import ANP, FTSAM, IBAU, NAD, NBA, SAU, FinePruning, FineTuning
from nba_lightning.implants import InputAwareTraining, Steganography
from nba_lightning.training import Classifier, Defense

__version__ = "0.1.0"
__all__ = [
    "ANP",
    "FTSAM",
    "IBAU",
    "NAD",
    "NBA",
    "SAU",
    "BackdoorDataModule",
    "Classifier",
    "Defense",
    "FinePruning",
    "FineTuning",
    "InputAwareTraining",
    "Steganography",
]
