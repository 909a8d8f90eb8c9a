"""Callbacks that a module brings, beside those that the user gave."""

from typing import Any
from weakref import WeakSet

from lightning.pytorch.callbacks import Callback

_FROM_MODULES = WeakSet[Callback]()  # a Trainer keeps them from fit to fit


def unless_given(trainer: Any, *callbacks: Callback) -> list[Callback]:
    """Those whose kind no user gave to the Trainer, if any: Lightning would put them in the place of the user's."""
    given = [one for one in getattr(trainer, "callbacks", []) if one not in _FROM_MODULES]
    ours = [one for one in callbacks if not any(isinstance(other, type(one)) for other in given)]
    _FROM_MODULES.update(ours)
    return ours
