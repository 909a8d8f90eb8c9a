"""LightningModules: poisoned training and defences. One file each."""

from nba_lightning.modules.base import Classifier, Defense
from nba_lightning.modules.fine_tuning import FineTuning
from nba_lightning.modules.input_aware import InputAwareTraining
from nba_lightning.modules.nba import NBA
from nba_lightning.modules.steganography import Steganography

__all__ = ["NBA", "Classifier", "Defense", "FineTuning", "InputAwareTraining", "Steganography"]
