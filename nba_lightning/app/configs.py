"""Configs by name, and in an order in which no setting is lost."""

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

import nba_lightning.data
from nba_lightning.core.checks import expected
from nba_lightning.data import BackdoorDataModule

_CLASSES = ("model", "data")
"""What is given as a class and its arguments, often in different files."""


def shipped_folder() -> Path:
    """The folder of the shipped configs: inside the package where it is installed, beside it in a checkout."""
    package = Path(str(resources.files("nba_lightning")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """All shipped configs by name, such as ``defense/nba``."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Find a config file by its path, or a shipped one by its name with or without its folder.

    Args:
        name: a file, or such as ``nba`` or ``defense/nba``. Files win over names.

    Raises:
        ValueError: if there is no such file or name, or several shipped ones.
    """
    if Path(name).is_file():
        return Path(name)
    names = shipped_names()
    wanted = name.removesuffix(".yaml")
    found = [wanted] if wanted in names else [full for full in names if full.split("/")[-1] == wanted]
    if len(found) == 1:
        return shipped_folder() / f"{found[0]}.yaml"
    if found:
        raise expected("--config", f"one config, {' or '.join(found)}", repr(name))
    if Path(name).is_dir():
        raise expected("--config", "a file or the name of a shipped config", f"the folder {name!r}")
    short = [full.split("/")[-1] for full in names]
    stem = wanted.split("/")[-1]
    close = [stem] if stem in short else difflib.get_close_matches(stem, short, n=3, cutoff=0.6)
    meant = [full for full in names if full.split("/")[-1] in close]
    advice = f"Did you mean {' or '.join(meant)}?" if meant else f"Shipped are {', '.join(names)}."
    raise ValueError(f"Expected `--config` to be a file or the name of a shipped config, but got {name!r}. {advice}")


def read_config(config: str) -> dict[str, Any]:
    """Read a config file, or a config that is given as text.

    Raises:
        ValueError: with the file and the line if it is no YAML; if it holds no settings.
    """
    text = _is_text(config)
    name = "`--config`" if text else repr(config)
    try:
        loaded = yaml.safe_load(config if text else Path(config).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem or "not YAML"
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ValueError(f"Expected {name} to be YAML, but got this{where}: {problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {name} to be YAML, but it is no text in UTF-8.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"Expected {name} to hold settings such as `trainer:`, but got {type(loaded).__name__}.")
    return loaded


def arranged(configs: Sequence[str], given: Sequence[str] = ()) -> list[str]:
    """Find configs and order them so that the one that names a class comes before those that only set its arguments.

    Otherwise the order stays: later ones override earlier ones. So `nba` and `digits` mean the same in both orders.

    Args:
        configs: files, names or texts.
        given: ``model`` or ``data`` where a flag names its class.

    Raises:
        ValueError: if no order will do, or a class is named nowhere.
    """
    paths = [
        config if config.lstrip().startswith("{") or "\n" in config else str(find_config(config)) for config in configs
    ]
    left = [(path, read_config(path)) for path in paths]
    for part in _CLASSES:
        needy = [path for path, loaded in left if _needs(loaded, part)]
        if needy and part not in given and not any(_names(loaded, part) for _, loaded in left):
            what = {"model": "a defence such as `nba`", "data": "data such as `digits`"}[part]
            raise ValueError(
                f"Expected a config that names the class of `{part}`, but {needy[0]!r} only sets its arguments. "
                f"Add `--config` with {what}, or `--{part} CLASS`."
            )
    ordered: list[str] = []
    while left:
        free = next((item for item in left if not any(_after(item[1], other[1]) for other in left)), None)
        if free is None:
            raise ValueError(
                f"Expected configs of which one can come first, but {' and '.join(repr(path) for path, _ in left)} "
                "each set arguments of a class that the other names. Name `model` and `data` in one file."
            )
        left.remove(free)
        ordered.append(free[0])
    return ordered


def fitted_to_data(configs: Sequence[str], given: Sequence[str] = ()) -> list[str]:
    """Leave out what shipped defences ask of the research data where the data is something else.

    ``train_on``, ``clean_fraction`` and ``batch_size`` of a defence say which of the attacker's images the defender
    holds; a folder of clean images, or somebody's own data module, knows that itself.

    Args:
        configs: files or texts, arranged.
        given: names of data classes that flags give, the last of which counts.

    Returns:
        The configs, a changed one as text.
    """
    contents = [read_config(config) for config in configs]
    named = [_class_of(content["data"]) for content in contents if _names(content, "data")]
    data = [*named, *given]
    if not data or _is_research(data[-1]):
        return list(configs)
    defenses = shipped_folder() / "defense"
    strange = [not _is_text(config) and defenses in Path(config).absolute().parents for config in configs]
    return [
        yaml.safe_dump({key: value for key, value in content.items() if key != "data"}) if leave_out else config
        for config, content, leave_out in zip(configs, contents, strange, strict=True)
    ]


def _class_of(part: Any) -> str:
    return str(part if isinstance(part, str) else part["class_path"])


def _is_research(name: str) -> bool:
    """Whether a class path, or a name of ours alone, is the research data module's or a subclass's of it."""
    try:
        found = resolve_name(name) if "." in name else getattr(nba_lightning.data, name)
    except (ImportError, AttributeError, ValueError):
        return True  # the parser says what is wrong with it
    return isinstance(found, type) and issubclass(found, BackdoorDataModule)


def _is_text(config: str) -> bool:
    """Whether this is a config itself, not its file or name."""
    return "\n" in config or config.lstrip().startswith("{")


def _names(loaded: dict[str, Any], part: str) -> bool:
    value = loaded.get(part)
    return isinstance(value, str) or (isinstance(value, dict) and "class_path" in value)


def _needs(loaded: dict[str, Any], part: str) -> bool:
    return isinstance(loaded.get(part), dict) and not _names(loaded, part)


def _after(loaded: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a config sets arguments of a class that the other one names."""
    return any(_needs(loaded, part) and _names(other, part) for part in _CLASSES)
