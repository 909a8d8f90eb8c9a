"""LightningModules: training a classifier, NBA and the rival defences. One file each."""

from nba_lightning.modules.base import Classifier, Defense
from nba_lightning.modules.fine_tuning import FineTuning
from nba_lightning.modules.nba import NBA

__all__ = ["NBA", "Classifier", "Defense", "FineTuning"]
