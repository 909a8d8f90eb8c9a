"""Attacks: triggers, relabelling and who is poisoned. One file each."""

from nba_lightning.attacks.badnets import BadNets
from nba_lightning.attacks.base import Attack
from nba_lightning.attacks.blended import Blended

__all__ = ["Attack", "BadNets", "Blended"]
