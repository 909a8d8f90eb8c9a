"""Defences: LightningModules that clean a suspicious network. One file each."""

from nba_lightning.defenses.anp import ANP
from nba_lightning.defenses.ban import BAN
from nba_lightning.defenses.bti_dbf import BTIDBF
from nba_lightning.defenses.d3 import D3
from nba_lightning.defenses.fine_pruning import FinePruning
from nba_lightning.defenses.fine_tuning import FineTuning
from nba_lightning.defenses.fst import FST
from nba_lightning.defenses.ft_sam import FTSAM
from nba_lightning.defenses.i_bau import IBAU
from nba_lightning.defenses.nad import NAD
from nba_lightning.defenses.nba import NBA
from nba_lightning.defenses.npd import NPD
from nba_lightning.defenses.rnp import RNP
from nba_lightning.defenses.sau import SAU
from nba_lightning.defenses.unlearning import Unlearning

__all__ = [
    "ANP",
    "BAN",
    "BTIDBF",
    "D3",
    "FST",
    "FTSAM",
    "IBAU",
    "NAD",
    "NBA",
    "NPD",
    "RNP",
    "SAU",
    "FinePruning",
    "FineTuning",
    "Unlearning",
]
