r"""Decision rules: from one statistic for each class to p-values.

Published rules are not used. MM-BD fits a gamma distribution to the K - 1 smaller statistics and asks how likely the
largest one is; others call a class an outlier whose distance from the median is more than two median absolute
deviations. Both take parameters that were estimated on ten numbers as known: with nothing to find, at a nominal 5 %,
they alarm far more often (``benchmarks/scan.py --null``).

All p-values here are adjusted for the number of classes: that of class k is the chance that the *largest* statistic of
a network without an outlier is as large as that of class k. Two things they cannot do. Natural outliers exist (a class
that is easier than the others in every network); only reference networks tell them from implanted ones. And classes are
compared with each other, so that an all-to-all backdoor, or several targets, leave no class that stands out.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nba_lightning.core.checks import check_at_least, expected
from nba_lightning.core.randomness import generator_for

LEAST_CLASSES = 3
"""With two classes, whichever is larger stands out as much as the other stands in."""
_CHUNK = 2_000_000
"""Numbers that are drawn at a time."""


class Rule(ABC):
    """A decision rule: the statistics of one network to one p-value for each class."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The rule in words, for a report."""

    @abstractmethod
    def __call__(self, statistics: Sequence[float]) -> list[float]:
        """One p-value in (0, 1] for each class, adjusted for the number of classes.

        Args:
            statistics: one finite number for each of at least three classes; the larger, the more suspicious.

        Raises:
            ValueError: for fewer classes, numbers that are not finite, or none that is positive.
        """


class StudentisedMaximum(Rule):
    r"""The largest studentised logarithm, against what the largest of K equal classes would be.

    .. math:: z_k = \frac{\log s_k - m}{v}, \qquad p_k = P(\max_j Z_j \ge z_k)

    with mean m and standard deviation v over *all* classes, and Z the same from K independent normal numbers, drawn
    `draws` times. This is Grubbs' test (Technometrics 1969) on logarithms, one-sided, with a Monte-Carlo null; it is
    exact where the logarithms of the statistics are independent and normal. One strong outlier does not hide behind
    the v that it inflates, two of the same size do.

    Args:
        draws: networks that are simulated; the smallest p-value is 1 / (draws + 1).
        seed: of the simulation.
    """

    def __init__(self, draws: int = 20_000, seed: int = 0) -> None:
        check_at_least("draws", draws, 1)
        self.draws, self.seed = draws, seed

    @property
    def name(self) -> str:
        """The rule in words, for a report."""
        return f"studentised maximum of the logarithm, {self.draws} Monte-Carlo draws"

    def __call__(self, statistics: Sequence[float]) -> list[float]:
        """See :class:`Rule`."""
        found = studentised(logarithms([statistics]))[0]
        null = _null(len(found), self.draws, self.seed)
        return _upper_tail(null, found)


class Conformal(Rule):
    r"""How a network stands among clean networks of the same classes: exact for any distribution.

    The z of :class:`StudentisedMaximum` are standardised a second time, class by class, over the n reference networks
    and the one that is judged (so that a class that is easy in every network is no outlier). With
    :math:`r_i = \max_k r_{ik}` of the references,

    .. math:: p_k = \frac{1 + |\{i : r_i \ge r_k\}|}{n + 1}.

    Since all n + 1 networks are treated alike, a clean one gets :math:`p \le \alpha` with a chance of at most
    :math:`\alpha`, whatever the distribution, if it is exchangeable with the references: same data, same recipe, same
    settings of the scan (Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", 2005, chapter 2; the
    score is ours). A reference trained otherwise makes the p-value wrong in either direction.

    Args:
        references: statistics of the clean networks, n lists of K numbers. The smallest p-value is 1 / (n + 1): to
            call anything unusual at 5 %, it takes 19.

    Raises:
        ValueError: for fewer than two references, or lists of different length.
    """

    def __init__(self, references: Iterable[Sequence[float]]) -> None:
        self.references = [[float(value) for value in row] for row in references]
        check_at_least("len(references)", len(self.references), 2)
        lengths = {len(row) for row in self.references}
        if len(lengths) > 1:
            raise expected("references", "of the same number of classes", sorted(lengths))
        logarithms(self.references)

    @property
    def name(self) -> str:
        """The rule in words, for a report."""
        return f"conformal, {len(self.references)} reference networks"

    def __call__(self, statistics: Sequence[float]) -> list[float]:
        """See :class:`Rule`."""
        classes = len(self.references[0])
        if len(statistics) != classes:
            raise expected("statistics", f"one for each of the references' {classes} classes", len(statistics))
        found = _standardised(studentised(logarithms([*self.references, list(statistics)])), dim=0)
        return _upper_tail(found[:-1].amax(dim=1).sort().values, found[-1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"rule": "conformal", "references": self.references}

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "Conformal":
        """The rule that :meth:`to_dict` wrote."""
        if saved.get("rule") != "conformal":
            raise expected("rule", "conformal", repr(saved.get("rule")))
        return Conformal(saved["references"])


def logarithms(statistics: Sequence[Sequence[float]]) -> Tensor:
    """Natural logarithms `(N, K)`, float64, of the statistics of N networks.

    A class that is not reached at all (a statistic of 0 or less) counts as hard as the hardest one that is.

    Raises:
        ValueError: for fewer than three classes, numbers that are not finite, or a network without a positive one.
    """
    found = torch.tensor(statistics, dtype=torch.float64)
    if found.shape[1] < LEAST_CLASSES:
        raise expected("statistics", f"of at least {LEAST_CLASSES} classes", found.shape[1])
    if not bool(found.isfinite().all()):
        raise expected("statistics", "finite", found[~found.isfinite()].tolist())
    if not bool((found > 0).any(dim=1).all()):
        raise expected("statistics", "positive for at least one class", "none")
    smallest = found.masked_fill(found <= 0, math.inf).amin(dim=1, keepdim=True)
    return found.maximum(smallest).log()


def studentised(values: Tensor) -> Tensor:
    """Values `(N, K)` minus their mean over the K classes, by their standard deviation; 0 where all are the same."""
    return _standardised(values, dim=1)


def _standardised(values: Tensor, dim: int) -> Tensor:
    deviation = values.std(dim=dim, keepdim=True)
    # Logarithms that agree to the sixth digit differ by rounding.
    same = deviation < 1e-6
    return ((values - values.mean(dim=dim, keepdim=True)) / deviation.clamp(min=1e-6)).masked_fill(same, 0.0)


def _upper_tail(null: Tensor, found: Tensor) -> list[float]:
    """Share of the sorted null `(n,)` that is at least as large as each `(K,)`, the found one counted in."""
    smaller = torch.searchsorted(null, found - 1e-12)
    result: list[float] = ((len(null) - smaller + 1).double() / (len(null) + 1)).tolist()
    return result


@lru_cache(maxsize=32)
def _null(classes: int, draws: int, seed: int) -> Tensor:
    """Largest studentised value of ``classes`` normal numbers, ``draws`` times, sorted."""
    generator = generator_for(seed, classes)
    maxima = []
    for part in torch.split(torch.arange(draws), max(1, _CHUNK // classes)):
        normal = torch.randn((len(part), classes), generator=generator, dtype=torch.float64)
        maxima.append(studentised(normal).amax(dim=1))
    return torch.cat(maxima).sort().values
