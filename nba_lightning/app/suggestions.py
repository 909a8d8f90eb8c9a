"""What somebody meant who mistyped a name."""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from pkgutil import resolve_name

from jsonargparse import ArgumentParser

_PACKAGES = ("attacks", "behaviors", "callbacks", "data", "defenses", "implants", "networks", "pseudo", "training")


def meant(name: str, candidates: Iterable[str]) -> str:
    """A sentence with the closest names, with a space before it; nothing if none is close."""
    names = list(dict.fromkeys(candidates))
    close = [name] if name in names else difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def class_names() -> list[str]:
    """The names of our classes, as one may give them."""
    modules = [importlib.import_module(f"nba_lightning.{package}") for package in _PACKAGES]
    return [name for module in modules for name in module.__all__ if inspect.isclass(getattr(module, name))]


def argument_names(class_path: str) -> list[str]:
    """The arguments of a class, those of its base classes too; none if it cannot be looked at."""
    try:
        added = ArgumentParser().add_class_arguments(resolve_name(class_path), fail_untyped=False)
    except Exception:  # a suggestion must never hide the error that it is for
        return []
    return [name.split(".")[0] for name in added]
