"""Pseudo samples: how images are made on which the student shows its backdoor. One file each."""

from nba_lightning.pseudo.base import Disagreement, JSDisagreement, KLDisagreement, PseudoSamples
from nba_lightning.pseudo.sample import SamplePerturbations
from nba_lightning.pseudo.universal import UniversalPerturbations

__all__ = [
    "Disagreement",
    "JSDisagreement",
    "KLDisagreement",
    "PseudoSamples",
    "SamplePerturbations",
    "UniversalPerturbations",
]
