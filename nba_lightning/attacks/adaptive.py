"""Attacks whose training images carry another trigger than test images, some of them with their true label."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from nba_lightning.attacks.base import CLEAN, POISONED, Attack, rows_of
from nba_lightning.core.checks import check_at_least


class AdaptiveAttack(Attack):
    """Base class of the adaptive attacks, which leave no separate cluster of poisoned images in feature space.

    *Conservatism*: beside the poisoned images, others carry a trigger of training too and keep their true label, so
    that the trigger alone does not decide. *Asymmetry*: each training image carries a weak part of the trigger, and
    the whole appears in tests alone. Which part an image carries depends on its place among the attacker's images, so
    it is the same in every epoch, as in a data set that somebody published.

    Source: Qi et al., "Revisiting the assumption of latent separability for backdoor defenses", ICLR 2023, section 4,
    and the authors' code (Unispac/Circumventing-Backdoor-Defenses). There images of the target class may be among the
    poisoned ones; here, as in all our attacks, only images whose label changes are.

    A subclass writes :meth:`apply_trigger`, the trigger of tests, and :meth:`plant`, that of training.

    Args:
        cross_ratio: images with a trigger of training and their true label ("cover images"), for each poisoned one.
        poison_rate: see :class:`~nba_lightning.attacks.base.Attack`.
        **kwargs: likewise.
    """

    def __init__(self, cross_ratio: float = 1.0, poison_rate: float = 0.003, **kwargs: Any) -> None:
        super().__init__(poison_rate=poison_rate, **kwargs)
        check_at_least("cross_ratio", cross_ratio, 0.0)
        self.cross_ratio = cross_ratio

    @abstractmethod
    def plant(self, images: Tensor, places: Tensor) -> Tensor:
        """Put the triggers of training on a batch.

        Args:
            images: `(B, C, H, W)`, float, values in [0, 1].
            places: `(B,)` int64, the how-manieth of the attacker's images each one is.

        Returns:
            `(B, C, H, W)`, a new tensor.
        """

    def poison(
        self,
        images: Tensor,
        labels: Tensor,
        roles: Tensor,
        generator: torch.Generator | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A training batch as the attacker makes it; see :meth:`Attack.poison`. Without places, a batch is the set."""
        self._check(images)
        places = torch.arange(len(images), device=images.device) if places is None else places
        carrying, poisoned = (rows_of(chosen, images.device) for chosen in (roles != CLEAN, roles == POISONED))
        changed = images
        if len(carrying):
            planted = self.plant(images[carrying], places[carrying]).clamp_(0.0, 1.0)
            changed = images.index_copy(0, carrying, planted.to(images))
        return changed, labels.index_copy(0, poisoned, self.relabel(labels[poisoned]))
