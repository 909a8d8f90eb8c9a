"""Inner products between adjacent layers."""

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor

from nba_lightning.behaviors.base import Behavior
from nba_lightning.core.functional import fsp_matrix


class FSP(Behavior):
    """How one layer's channels go over into the next one's (Yim et al., CVPR 2017, section 3.2). Two layers or more."""

    min_layers = 2

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Describe each pair of adjacent layers; see :func:`nba_lightning.core.functional.fsp_matrix`."""
        return {f"{a}->{b}": fsp_matrix(features[a], features[b]) for a, b in pairwise(features)}
