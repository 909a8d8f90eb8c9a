"""Scans: is a network backdoored, to which class, without trigger or attack record. One file each."""

from nba_lightning.scan.base import Scan
from nba_lightning.scan.class_shift import ClassShift
from nba_lightning.scan.disagreement import TeacherDisagreement
from nba_lightning.scan.maximum_margin import MaximumMargin
from nba_lightning.scan.result import ScanResult, sentence
from nba_lightning.scan.scanning import Scanning
from nba_lightning.scan.statistics import Conformal, Rule, StudentisedMaximum

__all__ = [
    "ClassShift",
    "Conformal",
    "MaximumMargin",
    "Rule",
    "Scan",
    "ScanResult",
    "Scanning",
    "StudentisedMaximum",
    "TeacherDisagreement",
    "sentence",
]
