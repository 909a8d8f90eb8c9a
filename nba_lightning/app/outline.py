"""jsonargparse's errors are indented outlines, a level for each type that was tried: what they say at the bottom."""

import re
from typing import NamedTuple

from nba_lightning.app.suggestions import argument_names, class_names, meant

_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
_PATH = re.compile(r"Expected a path but (.*) either not accessible or invalid")
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='[^']*', val='?(.*?)'?\)|(.*))$")
_TYPE = re.compile(r"Expected an? (?:<class '([^']+)'>|typing\.Literal\[(.*?)\]|(.*?))(?:\. Got value: (.*))?$")
_NOISE = ("Does not validate against any", "Subtypes:", "Errors:", "Given value type:", "Subclass types expect one of:")


class _Leaf(NamedTuple):
    keys: tuple[str, ...]
    class_path: str | None
    text: str


def innermost(message: str) -> str:
    """The sentence at the bottom of an outline, with the option that it is about."""
    leaves, given = _read(message)
    leaves = [leaf for leaf in leaves if "NoneType" not in leaf.text] or leaves
    if not leaves:
        return message.strip()
    for leaf in leaves:
        if leaf.text.startswith("Expected `"):
            return leaf.text
    first = max(leaves, key=lambda leaf: (not leaf.text.startswith("Expected a "), len(leaf.keys)))
    alike = [leaf for leaf in leaves if leaf.keys == first.keys and _TYPE.match(leaf.text)]
    if first in alike and "dot import path" not in first.text:
        names = [leaf for leaf in alike if "dot import path" in leaf.text]
        return _said(names[0], given) if names else _of_types(first, alike, given)
    return _said(first, given)


def _read(message: str) -> tuple[list[_Leaf], str]:
    """The leaves of the outline, and the value that was given."""
    leaves: list[_Leaf] = []
    stack: list[tuple[int, str, str]] = []
    given = ""
    for line in message.splitlines():
        bare = line.lstrip()
        indent = len(line) - len(bare)
        if bare.startswith("- "):
            bare, indent = bare[2:], indent + 2
        while stack and stack[-1][0] >= indent and bare:
            stack.pop()
        for kind, pattern in (("key", _KEY), ("class", _CLASS)):
            if match := pattern.match(bare):
                stack.append((indent, kind, match[1]))
                bare = match[2]
        if match := _PATH.match(bare) or _GIVEN.match(bare):
            given = given or next((group for group in match.groups() if group), "")
        elif bare and not bare.startswith(_NOISE):
            keys = tuple(value for _, kind, value in stack if kind == "key")
            classes = [value for _, kind, value in stack if kind == "class"]
            leaves.append(_Leaf(keys, classes[-1] if classes else None, bare))
    return leaves, given


def _of_types(first: _Leaf, alike: list[_Leaf], given: str) -> str:
    """The value has none of these types."""
    wanted, got = [], given
    for leaf in alike:
        match = _TYPE.match(leaf.text)
        assert match is not None
        wanted.append((match[1] or match[2] or match[3]).split(".")[-1] if not match[2] else match[2])
        got = match[4] or got
    choices = ", ".join(dict.fromkeys(", ".join(wanted).replace("'", "").split(", ")))
    kind = "one of " if "," in choices else ""
    return f"Expected {_option(first)} to be {kind}{choices}, but got {got!r}."


def _said(leaf: _Leaf, given: str) -> str:
    """A leaf in our own phrasing where it is a known one."""
    option = _option(leaf)
    if match := re.match(r"Option '([^']+)' is not accepted", leaf.text):
        name = match[1].split(".")[0]
        owner = (leaf.class_path or "").split(".")[-1]
        return f"Expected an argument of {owner}, but got {name!r} ({option}).{_meant_argument(name, leaf)}"
    missing = re.match(r"module '[^']*' has no attribute|No module named|cannot import name", leaf.text)
    if missing or "dot import path" in leaf.text:
        name = (leaf.class_path if missing else leaf.text.rsplit(": ", 1)[-1]) or given
        close = meant(name.split(".")[-1], class_names())
        reason = f" ({leaf.text})" if missing and "No module" in leaf.text else ""
        return f"Expected {option} to name a class, but got {name!r}{reason}.{close}"
    if match := re.search(r"not correspond to a subclass of (\w+)", leaf.text):
        return f"Expected {option} to be a subclass of {match[1]}, but got {given!r}."
    if match := re.match(r"(File does not exist|Path is not a file): (.*)", leaf.text):
        return f"Expected {option} to be a file, but got {match[2]}."
    if leaf.keys:
        return f"{option}: {leaf.text}"
    return leaf.text[:1].upper() + leaf.text[1:]


def _meant_argument(name: str, leaf: _Leaf) -> str:
    return meant(name, argument_names(leaf.class_path)) if leaf.class_path else ""


def _option(leaf: _Leaf) -> str:
    return f"`--{'.'.join(leaf.keys)}`" if leaf.keys else "the value"
