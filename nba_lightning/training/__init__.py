"""What every fit shares: training a classifier, defences, distillation, schedules, compilation."""

from nba_lightning.training.classifier import Classifier
from nba_lightning.training.defense import Defense
from nba_lightning.training.distillation import Distillation

__all__ = ["Classifier", "Defense", "Distillation"]
