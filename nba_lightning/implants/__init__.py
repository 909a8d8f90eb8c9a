"""What the attacker trains beside a classifier. One file each."""

from nba_lightning.implants.input_aware import InputAwareTraining
from nba_lightning.implants.steganography import Steganography

__all__ = ["InputAwareTraining", "Steganography"]
