"""Spatial attention maps."""

from torch import Tensor

from nba_lightning.behaviors.base import Behavior
from nba_lightning.core.checks import check_range
from nba_lightning.core.functional import attention_map


class AttentionMap(Behavior):
    """Where the network looks (Zagoruyko & Komodakis, ICLR 2017, section 3.1; the form of NAD, ICLR 2021, section 3).

    Args:
        power: exponent of the channels' magnitudes, above 0.
    """

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        check_range("power", power, 0.0, float("inf"), open_low=True)
        self.power = power

    def describe(self, features: Tensor) -> Tensor:
        """Describe one layer; see :func:`nba_lightning.core.functional.attention_map`."""
        return attention_map(features, self.power)
