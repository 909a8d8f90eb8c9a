"""Knowledge forms: high-level representations of intermediate features. One file each."""

from nba_lightning.behaviors.attention import AttentionMap
from nba_lightning.behaviors.base import Behavior, alignment_loss
from nba_lightning.behaviors.fsp import FSP
from nba_lightning.behaviors.gram import ChannelGram
from nba_lightning.behaviors.pooled import PooledFeatures
from nba_lightning.behaviors.similarity import SampleSimilarity

__all__ = ["FSP", "AttentionMap", "Behavior", "ChannelGram", "PooledFeatures", "SampleSimilarity", "alignment_loss"]
