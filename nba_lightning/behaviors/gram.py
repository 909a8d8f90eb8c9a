"""Channel Gram matrices."""

from torch import Tensor

from nba_lightning.behaviors.base import Behavior
from nba_lightning.core.functional import channel_gram


class ChannelGram(Behavior):
    """Which channels fire together, summed over all positions (Gatys et al., CVPR 2016, section 2.2)."""

    def describe(self, features: Tensor) -> Tensor:
        """Describe one layer; see :func:`nba_lightning.core.functional.channel_gram`."""
        return channel_gram(features)
