"""The strongest learning rate that clean accuracy allows: fits a defence to a network, blind to any trigger."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.paired import MAY_BE_CHANCE

RATES = {"SGD": (0.2, 0.1, 0.05, 0.025, 0.012, 0.006, 0.003), "AdamW": (3e-3, 1e-3, 3e-4, 1e-4)}
"""Learning rates to try with each optimiser, the strongest first."""
USUAL_RATE = {"SGD": 0.05, "AdamW": 1e-3}
"""A teacher's, where nothing was measured."""
TEACHERS_LOSS = 1.75
"""What NBA's teacher may lose, in units of what the cleaned network may: the student learns a part of it back."""
STUDENT_SHARE = 1 / 3
"""NBA's rate as a share of its teacher's: the teacher forgets at a high rate, the student learns at a lower one."""
FEW_IMAGES = 200
"""Clean images of which fewer are few: they tell little of what a network learned, and are soon learned by heart."""
UNLEARNING_RATE = {"SGD": 0.005, "AdamW": 1e-4}
"""Of unlearning what verification found, where no student's rate is lower."""
UNLEARNING_STEPS = 200
"""Optimiser steps of it, about; it was found with 150."""
MAY_BE_LEFT = 0.1
"""Share of a backdoor that a teacher may seem to have kept by nature; 7 % at most of those that had forgotten it."""
_LEAST_OF_WITNESS = 0.5
"""Share of the suspicious network's accuracy; a network that has less is a ruin and bears witness to nothing."""
MIXED_OF_FEW = 0.5
"""Share of few images that CutMix mixes for a teacher; of many it gains nothing."""
MANY_IMAGES = 1000
"""Clean images of which at least so many are many: with 400 perturbed features cost accuracy and remove nothing."""
LATENT_OF_MANY = 1 / 3
"""Share of many images whose features are perturbed for a teacher."""


def usual_optimizer(network: nn.Module) -> Literal["SGD", "AdamW"]:
    """The optimiser of a network's kind: AdamW for those with layer or group normalisation or depthwise convolutions.

    Transformers, ConvNeXt, EfficientNet and MobileNet are trained by adaptive optimisers, and plain SGD ruins them long
    before it removes anything, as it does residual networks with group normalisation; those with batch normalisation or
    none take SGD with momentum.
    """
    for layer in network.modules():
        depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        if depthwise or isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            return "AdamW"
    return "SGD"


def allowed_loss(baseline: float, images: int, max_loss: float = 0.05) -> float:
    r"""How much accuracy on held-out images a learning rate may cost.

    ``max_loss``, or what chance may explain where that is more: one standard error of the baseline, or five images,
    which the exact test cannot tell from chance where none is gained (p = 3 %), as
    :class:`~nba_lightning.callbacks.Guard` has it:

    .. math:: \max(max\_loss, \sqrt{p (1 - p) / (n + 4)}, 5 / n), \quad p = (n a + 2) / (n + 4)

    What is too weak leaves the backdoor, so chance is held against no strong rate.

    Source: Agresti & Coull, "Approximate is better than 'exact' for interval estimation of binomial proportions", The
    American Statistician 52(2), 1998, for two right and two wrong answers more, without which a few images that are all
    right would seem certain.

    Args:
        baseline: accuracy a of the suspicious network on the held-out clean images, in [0, 1].
        images: their number n.
        max_loss: what the owner can do without, in [0, 1].

    Raises:
        ValueError: for an accuracy outside [0, 1] or no image.

    Example:
        >>> allowed_loss(0.8, 250), round(allowed_loss(0.8, 40), 3), allowed_loss(0.8, 20)
        (0.05, 0.125, 0.25)
    """
    check_range("baseline", baseline, 0.0, 1.0)
    check_range("max_loss", max_loss, 0.0, 1.0)
    check_at_least("images", images, 1)
    return min(1.0, max(max_loss, _standard_error(baseline, images), MAY_BE_CHANCE / images))


def teachers_loss(max_loss: float) -> float:
    """What NBA's teacher may lose where the cleaned network may lose ``max_loss``, in [0, 1]."""
    return min(1.0, TEACHERS_LOSS * max_loss)


def teachers_mixed_share(images: int) -> float:
    """Share of the images of NBA's teacher that CutMix mixes, of so many clean images; in [0, 1]."""
    return MIXED_OF_FEW if images < FEW_IMAGES else 0.0


def teachers_latent_share(images: int) -> float:
    """Share of the images of NBA's teacher whose features are perturbed, of so many clean images; in [0, 1]."""
    return 0.0 if images < MANY_IMAGES else LATENT_OF_MANY


def least_accuracy(baseline: float, images: int, max_loss: float = 0.05) -> float:
    """What a network must reach on the held-out images to have lost no more than :func:`allowed_loss`."""
    return baseline - allowed_loss(baseline, images, max_loss) - 1e-9


def keeps(accuracy: float, baseline: float, images: int, max_loss: float = 0.05) -> bool:
    """Whether a network that reached ``accuracy`` on the held-out images lost no more than :func:`allowed_loss`."""
    check_range("accuracy", accuracy, 0.0, 1.0)
    return accuracy >= least_accuracy(baseline, images, max_loss)


def may_replace(now: float, before: float, baseline: float, images: int, max_loss: float = 0.05) -> bool:
    """Whether a network may take the place of the one that it was fitted from.

    Args:
        now: its accuracy on the held-out images, in [0, 1].
        before: that of the other one.
        baseline: that of the suspicious network.
        images: their number.
        max_loss: what the owner can do without.

    Returns:
        Whether it :func:`keeps` the accuracy, or lost no more than a standard error since: what came before may have
        lost almost all that it could, and an image more or less is no reason to keep what only it withstands.

    Example:
        >>> may_replace(0.732, before=0.74, baseline=0.8, images=250), may_replace(0.70, 0.74, 0.8, 250)
        (True, False)
    """
    return now >= before - _standard_error(before, images) or keeps(now, baseline, images, max_loss)


def _standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy on so many images, with two right and two wrong answers more; see :func:`allowed_loss`."""
    share = (images * accuracy + 2) / (images + 4)
    return math.sqrt(share * (1 - share) / (images + 4))


def next_rate(rates: Iterable[float], kept: Mapping[float, bool]) -> float | None:
    """Which rate of a sweep to try next: the middle one of those that may still be the strongest that can be afforded.

    A rate weaker than one that kept the accuracy is not looked for, and one stronger than one that lost it would lose
    it too. So three fits find the strongest of seven rates.

    Args:
        rates: all of the sweep.
        kept: of those that were tried, whether the network kept its accuracy.

    Returns:
        The rate, or ``None`` if nothing is left to try.

    Example:
        >>> next_rate(RATES["SGD"], {})
        0.025
        >>> next_rate(RATES["SGD"], {0.025: True, 0.1: False})
        0.05
    """
    weakest_lost = min((rate for rate, good in kept.items() if not good), default=math.inf)
    strongest_kept = max((rate for rate, good in kept.items() if good), default=0.0)
    left = sorted((rate for rate in rates if strongest_kept < rate < weakest_lost), reverse=True)
    return left[len(left) // 2] if left else None


def gentler_rates(rates: Iterable[float], tried: Iterable[float], strongest: float) -> list[float]:
    """Rates that a search for the strongest left out, between it and the weakest that was tried.

    NBA's teacher is the most accurate of those that withstand as much, so these are worth a fit too.

    Args:
        rates: all of the sweep.
        tried: those of the search.
        strongest: what it found.

    Returns:
        From the strongest to the weakest; at most one of :data:`RATES`.

    Example:
        >>> gentler_rates(RATES["SGD"], [0.025, 0.1, 0.2], strongest=0.1)
        [0.05]
    """
    known = set(tried)
    return sorted((rate for rate in rates if min(known) < rate < strongest and rate not in known), reverse=True)


def witness_rate(accuracies: Mapping[float, float], strongest: float, baseline: float) -> float | None:
    """The weakest rate above the one that was taken, whose network may bear witness to what that one has kept.

    Args:
        accuracies: of networks on the held-out images, in [0, 1], by learning rate; 0 for a fit that came to no end.
        strongest: the rate that was taken.
        baseline: accuracy of the suspicious network.

    Returns:
        It, or ``None`` if there is none that is right on half as many images as the suspicious network.

    Example:
        >>> witness_rate({0.2: 0.6, 0.1: 0.7, 0.05: 0.78}, strongest=0.05, baseline=0.8)
        0.1
    """
    least = _LEAST_OF_WITNESS * baseline
    return min((rate for rate, right in accuracies.items() if rate > strongest and right >= least), default=None)


def unlearning_rate(student: float, optimizer: Literal["SGD", "AdamW"]) -> float:
    """Of unlearning after a student that was fitted at a rate: no higher than that, which the network bore.

    Example:
        >>> unlearning_rate(0.017, "SGD"), unlearning_rate(0.001, "SGD")
        (0.005, 0.001)
    """
    return min(student, UNLEARNING_RATE[optimizer])


def rate_between(one: float, other: float) -> float:
    """The geometric mean of two rates, to two digits.

    Example:
        >>> rate_between(0.05, 0.1)
        0.071
    """
    return float(f"{math.sqrt(one * other):.2g}")


def strongest_rate(accuracies: Mapping[float, float], baseline: float, images: int, max_loss: float = 0.05) -> float:
    """The largest learning rate whose network kept its accuracy on held-out clean images.

    High rates are what removes backdoors, and what costs accuracy. Nothing here looks at a trigger.

    Args:
        accuracies: of the defended networks on the held-out clean images, in [0, 1], by learning rate; 0 for a fit that
            came to no end.
        baseline: of the suspicious network on the same images.
        images: their number.
        max_loss: what may be lost.

    Returns:
        The largest rate that :func:`keeps` the accuracy. Where none does, the largest whose accuracy is within a
        standard error of the highest: a gentle rate may lose as much as a stronger one, and leave what that removes.

    Source: the rule of one standard error (Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3).

    Raises:
        ValueError: for no rate, or accuracies outside [0, 1].

    Example:
        >>> strongest_rate({0.01: 0.80, 0.03: 0.78, 0.1: 0.62}, baseline=0.8, images=250)
        0.03
    """
    if not accuracies:
        raise expected("accuracies", "of at least one rate", "none")
    kept = [rate for rate, accuracy in accuracies.items() if keeps(accuracy, baseline, images, max_loss)]
    if kept:
        return max(kept)
    highest = max(accuracies.values())
    least = highest - _standard_error(highest, images) - 1e-9
    return max(rate for rate, accuracy in accuracies.items() if accuracy >= least)


def most_accurate(accuracies: Mapping[float, float]) -> float:
    """Of rates whose networks do equally well otherwise the one of the highest accuracy, of equal ones the smallest.

    Args:
        accuracies: of networks on the held-out images, in [0, 1], by learning rate; at least one.

    Example:
        >>> most_accurate({0.1: 0.78, 0.05: 0.81, 0.025: 0.81})
        0.025
    """
    return max(accuracies, key=lambda rate: (accuracies[rate], -rate))
