"""What a module was made of, so that a file keeps it: plain hyperparameters, and descriptions of its other parts."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import nn

from nba_lightning.core.checks import is_plain
from nba_lightning.core.modes import Frozen

_FILES = ("weights", "teacher_weights")
"""Arguments that name files: a checkpoint has the weights, and must load where the files are gone."""


def keep_plain_hyperparameters(module: pl.LightningModule) -> None:
    """Keep the plain arguments of the constructor that calls this in ``hparams``, which a checkpoint holds.

    Those that came from a YAML are plain: Lightning's command line records their configuration. The others, which need
    code to be read, are described by :func:`describe_parts`.
    """
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    given: dict[str, Any] = {}
    for arguments in collect_init_args(frame.f_back, [], classes=(HyperparametersMixin,)):
        given.update(arguments)
    others = {name: value for name, value in given.items() if not is_plain(value)}
    module.save_hyperparameters(ignore=[*others], logger=False, frame=frame.f_back)
    module.hparams.update(dict.fromkeys(module.hparams.keys() & set(_FILES)))
    module.__dict__["_parts"] = {name: describe(value) for name, value in others.items() if name != "model"}


def describe(value: Any) -> str:
    """A part in one line: its class and its plain settings, functions by name."""
    if isinstance(value, Frozen):
        return f"{type(value.network).__name__} {value.fingerprint()}"
    if isinstance(value, functools.partial):
        settings = ", ".join(f"{key}={item!r}" for key, item in sorted(value.keywords.items()))
        return f"{describe(value.func)}({settings})"
    if inspect.isclass(value) or inspect.isroutine(value):
        return str(value.__qualname__)
    names = vars(value) if hasattr(value, "__dict__") else {}
    kept = {key: item for key, item in names.items() if key[0] != "_" and key != "training" and is_plain(item)}
    parts = {key: item for key, item in getattr(value, "_modules", {}).items() if isinstance(item, nn.Module)}
    shown = [f"{key}={item!r}" for key, item in kept.items()] + [f"{k}={describe(v)}" for k, v in parts.items()]
    return f"{type(value).__name__}({', '.join(shown)})"


def describe_parts(module: Any) -> dict[str, str]:
    """What ``hparams`` cannot hold: each part by name, frozen networks by their fingerprint."""
    frozen = {name: child for name, child in module.named_children() if isinstance(child, Frozen)}
    kept = {name: text for name, text in module.__dict__.get("_parts", {}).items() if name not in frozen}
    return kept | {name: describe(child) for name, child in frozen.items()}


def check_same_parts(module: Any, saved: Mapping[str, str]) -> None:
    """Compare a module's parts with those of the checkpoint that it takes over.

    Raises:
        ValueError: if a fit would go on with other parts than it began with.
    """
    own = describe_parts(module)
    other = {name: (saved.get(name), own.get(name)) for name in saved.keys() | own.keys()}
    other = {name: pair for name, pair in other.items() if pair[0] != pair[1]}
    if not saved or not other:
        return
    listed = "; ".join(f"`{name}` was {was}, is {now or 'the default'}" for name, (was, now) in sorted(other.items()))
    trainer = module._trainer
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
        raise ValueError(f"Expected the same parts as in the checkpoint, whose fit goes on, but got others: {listed}.")
    rank_zero_warn(f"The checkpoint was made with other parts; pass them again if you need them: {listed}.")
