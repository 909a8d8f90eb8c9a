"""The order of the house: imports point up the list only, siblings never import each other."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from nba_lightning._moved import MOVED

ROOT = Path(__file__).parent.parent / "nba_lightning"
ORDER = [
    ["core"],
    ["io"],
    ["networks", "attacks", "behaviors", "pseudo"],
    ["data", "callbacks"],
    ["training"],
    ["implants", "defenses", "scan"],
    ["app"],
    ["__main__"],
]
SIBLINGS = ("attacks", "behaviors", "defenses", "scan")
"""Parts whose files never import each other, but for what they all share."""
SHARED = ("base", "adaptive", "surrogate", "result", "statistics")
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "_moved.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nba_lightning"):
            yield node.module.split(".")[1:]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_up(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for target in imported(path):
        if not target:
            assert part in ("app", "__main__")
        elif target[0] == part:
            assert part not in SIBLINGS or target[1] in SHARED, f"{path.name} imports its sibling {target[1]}"
        else:
            assert LEVEL[target[0]] <= LEVEL[part], f"{part} imports {target}"
            assert not {target[0], part} <= {"data", "callbacks"}
            assert not (part in ("training", "implants", "defenses", "scan") and target[0] == "data")


def test_every_file_keeps_one_role():
    assert {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 290} == {}


@pytest.mark.parametrize("old", MOVED)
def test_names_of_before_are_found_with_a_warning(old):
    with pytest.warns(DeprecationWarning, match=f"`nba_lightning.{old}` is `nba_lightning.* now"):
        module = importlib.import_module(f"nba_lightning.{old}")
    sys.modules.pop(f"nba_lightning.{old}")
    public = {"weights": "load_weights", "modules": "NBA", "cli": "main"}.get(old)
    assert public is None or hasattr(module, public)


def test_every_package_is_in_the_wheel():
    listed = (ROOT.parent / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    packages = [line.strip(' ",') for line in listed.splitlines() if line.strip()]
    folders = {path.parent.relative_to(ROOT.parent).as_posix().replace("/", ".") for path in ROOT.rglob("*.py")}
    assert folders | {"nba_lightning.configs"} == set(packages)
