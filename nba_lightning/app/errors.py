"""Any error as one sentence: what was expected, of which argument, and what came."""

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from PIL import Image

from nba_lightning.app.commands import COMMANDS
from nba_lightning.app.outline import innermost
from nba_lightning.app.suggestions import meant
from nba_lightning.callbacks import NonFiniteLossError

ADVICE = "Set NBA_LIGHTNING_TRACEBACK=1 to see where it was raised."
_PLAIN = (MisconfigurationException, NonFiniteLossError, Image.DecompressionBombError)
"""Errors of others whose message says enough."""


class UsageError(Exception):
    """The parser's error: its message, and the options that there are."""

    def __init__(self, message: str, options: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.options = list(options)


class CommandError(Exception):
    """What ends the command: a sentence and an exit status."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


def explained(error: BaseException, config: dict[str, Any] | None = None) -> str:
    """Say an error in one sentence, in a few lines at most.

    Args:
        error: what was raised.
        config: the parsed configuration, in which the argument of a constructor's error is looked for.
    """
    if isinstance(error, UsageError):
        return _usage(error)
    inner = _unwrapped(error)
    text = _of_worker(str(inner).strip())
    if isinstance(inner, torch.OutOfMemoryError):
        return f"The device has too little memory; try a smaller `--data.batch_size` ({text.splitlines()[0]})"
    if "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
        return f"No space left on the disk ({text.splitlines()[0]}). What was written before is kept."
    if isinstance(inner, OSError) and inner.strerror:
        path = inner.filename2 or inner.filename  # of a copy, where it was to go
        return f"{inner.strerror}: {path!r}" if path is not None else f"{inner.strerror}."
    if isinstance(inner, _PLAIN):
        return text
    if isinstance(inner, ValueError) and "Union subtypes" in text:
        return innermost(text)
    if _is_ours(inner):
        option = _option_of(text, config or {})
        return f"{text} ({option})" if option else text
    return f"{type(inner).__name__}: {text}\n{ADVICE}"


def _usage(error: UsageError) -> str:
    message = str(error)
    if match := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        return f"Expected an option of this command, but got {match[1]!r}.{meant(match[1], error.options)}"
    if match := re.match(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)", message):
        choices = match[2].replace("'", "")
        return f"Expected one of {choices}, but got {match[1]!r}.{meant(match[1], choices.split(', '))}"
    if message.startswith('expected "subcommand" to be one of {'):  # which lists the first five only
        commands = ", ".join([*LightningCLI.subcommands(), *COMMANDS])
        return f"Expected one of {commands} first; `nba-lightning --help` says what they do."
    if match := re.match(r"the following arguments are required: (.*)", message):
        command, names = match[1].split(".")[0], [name.split(".", 1)[-1] for name in match[1].split(", ")]
        own = COMMANDS.get(command)
        missing = " and ".join(f"`{name}`" if own is not None and own.positional else f"`--{name}`" for name in names)
        if own is not None:
            return f"Expected {missing}; `nba-lightning {command} --help` says what is meant."
        return f"Expected {missing}, or a `--config` that gives it, such as `--config digits --config nba`."
    return innermost(message)


def _unwrapped(error: BaseException) -> BaseException:
    """The error that jsonargparse packed into those of its types, which it does once per level."""
    while "Union subtypes" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _of_worker(text: str) -> str:
    """What was raised in a process that loads data; torch puts that process's traceback before it."""
    if not text.startswith("Caught "):
        return text
    raised = list(re.finditer(r"^[\w.]+: ", text, re.MULTILINE))
    return text[raised[-1].end() :] if raised else text


def _is_ours(error: BaseException) -> bool:
    """Whether we raised it ourselves, on purpose."""
    if isinstance(error, FileNotFoundError) or _of_worker(str(error)).startswith("Expected `"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and "nba_lightning" in Path(frames[-1].filename).parts


def _option_of(sentence: str, config: dict[str, Any]) -> str | None:
    """The option of an "Expected `name` ..., but got value." if only one holds that value under that name."""
    if not sentence.startswith("Expected `"):
        return None
    name = sentence.split("`")[1]
    options = {option: value for option, value in _flat(config) if option.split(".")[-1] == name}
    if len(options) > 1:
        got = sentence.partition("but got ")[2]
        options = {option: value for option, value in options.items() if got.startswith((f"{value}.", f"{value!r}."))}
    return f"--{next(iter(options))}" if len(options) == 1 else None


def _flat(config: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    if not isinstance(config, dict):
        return [(".".join(path), config)]
    found = [] if not path else [(".".join(path), config)]
    for key, value in config.items():
        found += _flat(value, path if key == "init_args" else (*path, key))
    return found
