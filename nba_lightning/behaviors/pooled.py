"""Pooled features."""

from torch import Tensor

from nba_lightning.behaviors.base import Behavior
from nba_lightning.core.functional import pooled_features


class PooledFeatures(Behavior):
    """How strongly each channel fires on average."""

    def describe(self, features: Tensor) -> Tensor:
        """Describe one layer; see :func:`nba_lightning.core.functional.pooled_features`."""
        return pooled_features(features)
