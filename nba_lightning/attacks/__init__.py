"""Attacks: triggers, relabelling and who is poisoned. One file each."""

from nba_lightning.attacks.adap_blend import AdapBlend
from nba_lightning.attacks.adap_patch import AdapPatch
from nba_lightning.attacks.adaptive import AdaptiveAttack
from nba_lightning.attacks.badnets import BadNets
from nba_lightning.attacks.base import Attack
from nba_lightning.attacks.blended import Blended
from nba_lightning.attacks.bpp import BPP
from nba_lightning.attacks.ftrojan import FTrojan
from nba_lightning.attacks.grond import Grond
from nba_lightning.attacks.input_aware import InputAware
from nba_lightning.attacks.lc import LC
from nba_lightning.attacks.lf import LF
from nba_lightning.attacks.refool import Refool
from nba_lightning.attacks.scar import SCAR
from nba_lightning.attacks.sig import SIG
from nba_lightning.attacks.ssba import SSBA
from nba_lightning.attacks.surrogate import SurrogateAttack
from nba_lightning.attacks.trojannn import TrojanNN
from nba_lightning.attacks.wanet import WaNet

__all__ = [
    "BPP",
    "LC",
    "LF",
    "SCAR",
    "SIG",
    "SSBA",
    "AdapBlend",
    "AdapPatch",
    "AdaptiveAttack",
    "Attack",
    "BadNets",
    "Blended",
    "FTrojan",
    "Grond",
    "InputAware",
    "Refool",
    "SurrogateAttack",
    "TrojanNN",
    "WaNet",
]
