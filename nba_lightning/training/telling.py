"""Telling the user what was decided, once, from the first process."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


def tell_once(module: Any, sentences: Iterable[str]) -> None:
    """Warn of what a user should know; a module says the same thing once, however often it is fitted."""
    told: set[str] = module.__dict__.setdefault("_told", set())
    for sentence in sentences:
        if sentence not in told:
            told.add(sentence)
            rank_zero_warn(sentence)
