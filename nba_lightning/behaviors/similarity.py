"""Similarity of the samples of a batch."""

from torch import Tensor

from nba_lightning.behaviors.base import Behavior
from nba_lightning.core.functional import sample_similarity


class SampleSimilarity(Behavior):
    """Which samples of the batch look alike to the network (Tung & Mori, ICCV 2019, section 3)."""

    def describe(self, features: Tensor) -> Tensor:
        """Describe one layer; see :func:`nba_lightning.core.functional.sample_similarity`."""
        return sample_similarity(features)
