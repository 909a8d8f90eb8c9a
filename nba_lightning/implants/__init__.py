"""How an attacker trains where he does not only poison images. One file each."""

from nba_lightning.implants.flattened import FlattenedTraining
from nba_lightning.implants.grond import GrondTraining
from nba_lightning.implants.input_aware import InputAwareTraining
from nba_lightning.implants.scar import SCARTraining
from nba_lightning.implants.steganography import Steganography

__all__ = ["FlattenedTraining", "GrondTraining", "InputAwareTraining", "SCARTraining", "Steganography"]
