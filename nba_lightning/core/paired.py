"""Two shares on the same images: their difference, how sure it is, and what may be chance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVEL = 0.025
"""One-sided, as twice the standard error is."""
FEW_PAIRS = 40
"""Images of which fewer are few: a small loss cannot be told from none."""
MAY_BE_CHANCE = int(-math.log2(_LEVEL))
"""So many images that are lost while none is gained are not beyond chance by the exact test; one more is."""


@dataclass(frozen=True)
class Paired:
    """How many of n images were right before and after.

    Attributes:
        images: n.
        lost: b, right before only.
        gained: c, right after only.
    """

    images: int
    lost: int
    gained: int

    @staticmethod
    def of(before: Tensor, after: Tensor) -> "Paired":
        """Count; both `(n,)`, bool, about the same images in the same order."""
        counts = torch.stack([(before & ~after).sum(), (after & ~before).sum()]).tolist()
        return Paired(len(before), counts[0], counts[1])

    @property
    def loss(self) -> float:
        """(b - c) / n."""
        return (self.lost - self.gained) / self.images

    @property
    def standard_error(self) -> float:
        """Of the loss: sqrt(b + c - (b - c)^2 / n) / n, as McNemar's test has it (Psychometrika 1947)."""
        return _standard_error(self.lost, self.gained, self.images)

    def beyond_chance(self) -> bool:
        """Whether the loss is more than chance explains, at 2.5 %, by the standard error and by the exact test.

        The exact test looks at the changed images alone: where few changed, twice the standard error says little,
        however many there are.
        """
        return self.loss > 2 * self.standard_error and self.p_value() <= _LEVEL

    def interval(self) -> tuple[float, float]:
        """Where the loss lies at 95 %, also of few images.

        Half an image is added to each of the two counts, and two images to n (Agresti & Min, Statistics in Medicine
        2005): without it no loss among six images would pass for certainty.
        """
        lost, gained, images = self.lost + 0.5, self.gained + 0.5, self.images + 2
        middle, reach = (lost - gained) / images, 1.96 * _standard_error(lost, gained, images)
        return max(-1.0, middle - reach), min(1.0, middle + reach)

    def p_value(self) -> float:
        """The exact chance of so many lost ones among b + c, were each as often lost as gained (one-sided)."""
        changed = self.lost + self.gained
        at_least: int = sum(math.comb(changed, k) for k in range(self.lost, changed + 1))
        return float(at_least / 2**changed)


def _standard_error(lost: float, gained: float, images: float) -> float:
    return math.sqrt(max(0.0, lost + gained - (lost - gained) ** 2 / images)) / images
