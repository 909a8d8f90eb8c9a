"""Pseudo samples: how images are made on which the student shows its backdoor. One file each."""

from nba_lightning.pseudo.base import Disagreement, JSDisagreement, KLDisagreement, PseudoSamples
from nba_lightning.pseudo.class_patches import ClassPatches
from nba_lightning.pseudo.class_perturbations import ClassPerturbations
from nba_lightning.pseudo.latent import LatentPerturbations
from nba_lightning.pseudo.sample import SamplePerturbations
from nba_lightning.pseudo.together import Together
from nba_lightning.pseudo.trigger_families import TriggerFamilies
from nba_lightning.pseudo.universal import UniversalPerturbations

__all__ = [
    "ClassPatches",
    "ClassPerturbations",
    "Disagreement",
    "JSDisagreement",
    "KLDisagreement",
    "LatentPerturbations",
    "PseudoSamples",
    "SamplePerturbations",
    "Together",
    "TriggerFamilies",
    "UniversalPerturbations",
]
