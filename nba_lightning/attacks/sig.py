"""SIG: a sinusoid on images of the target class."""

import math
from typing import Any

import torch
from torch import Tensor

from nba_lightning.attacks.base import Attack
from nba_lightning.core.checks import check_range


class SIG(Attack):
    r"""A horizontal sinusoid is added, :math:`x'_{ij} = x_{ij} + \Delta \sin(2 \pi j f / W)`. Clean label.

    Source: Barni et al., "A new backdoor attack in CNNs by training set corruption without label poisoning", ICIP
    2019 (arXiv 1902.11237), section 3 (f = 6; :math:`\Delta` 40 of 255, also 20). Half of a class of CIFAR-10 is
    poisoned by default (a public benchmark takes all of it); the paper's shares are of the target class, ours of the
    training set.

    Args:
        delta: amplitude :math:`\Delta` in units of the image range [0, 1], in (0, 1].
        frequency: periods f over the width.
        poison_rate: share of the whole training set; see :class:`~nba_lightning.attacks.base.Attack`.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    allows_all_to_all = False
    clean_label = True
    signal: Tensor

    def __init__(
        self, delta: float = 40 / 255, frequency: float = 6.0, poison_rate: float = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(poison_rate=poison_rate, **kwargs)
        check_range("delta", delta, 0.0, 1.0, open_low=True)
        check_range("frequency", frequency, 0.0, math.inf, open_low=True)
        self.delta, self.frequency = delta, frequency

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the sinusoid `(W,)`."""
        width = image_shape[2]
        phase = 2 * math.pi * self.frequency / width * torch.arange(width, dtype=torch.float64)
        self.register_buffer("signal", (self.delta * phase.sin()).float(), persistent=False)

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Add the sinusoid."""
        return images + self.signal.to(images)
