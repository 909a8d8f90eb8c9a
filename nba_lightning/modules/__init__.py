"""LightningModules: poisoned training and defences. One file each."""

from nba_lightning.modules.anp import ANP
from nba_lightning.modules.base import Classifier, Defense
from nba_lightning.modules.distillation import Distillation
from nba_lightning.modules.fine_pruning import FinePruning
from nba_lightning.modules.fine_tuning import FineTuning
from nba_lightning.modules.ft_sam import FTSAM
from nba_lightning.modules.i_bau import IBAU
from nba_lightning.modules.input_aware import InputAwareTraining
from nba_lightning.modules.nad import NAD
from nba_lightning.modules.nba import NBA
from nba_lightning.modules.sau import SAU
from nba_lightning.modules.steganography import Steganography

__all__ = [
    "ANP",
    "FTSAM",
    "IBAU",
    "NAD",
    "NBA",
    "SAU",
    "Classifier",
    "Defense",
    "Distillation",
    "FinePruning",
    "FineTuning",
    "InputAwareTraining",
    "Steganography",
]
