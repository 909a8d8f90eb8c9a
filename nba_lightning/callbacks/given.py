"""Callbacks that a module brings, beside those that the user gave."""

from typing import Any

from lightning.pytorch.callbacks import Callback


def unless_given(trainer: Any, *callbacks: Callback) -> list[Callback]:
    """Those whose kind no user gave to the Trainer, if any: Lightning would put them in the place of the user's.

    Callbacks that a module brought to an earlier fit of the same Trainer leave it: they belonged to that fit.
    """
    present: list[Callback] = getattr(trainer, "callbacks", [])
    present[:] = [one for one in present if not getattr(one, "brought_by_a_module", False)]
    ours = [one for one in callbacks if not any(isinstance(other, type(one)) for other in present)]
    for one in ours:
        one.brought_by_a_module = True  # type: ignore[attr-defined]
    return ours
