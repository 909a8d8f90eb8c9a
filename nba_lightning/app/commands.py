"""The subcommands that are functions. A new one is a line in this table."""

from pkgutil import resolve_name
from typing import Any, NamedTuple

from lightning.pytorch.cli import LightningArgumentParser


class Command(NamedTuple):
    """A function whose arguments are the options: where it is (imported when it is called), and what it does."""

    function: str
    help: str
    prepare: str | None = None
    """Where the function is that changes the arguments before they are parsed, if there is one."""
    positional: bool = False
    """Whether arguments without a default are given without their names."""


COMMANDS = {
    "clean": Command(
        "nba_lightning.app.owner:clean_command",
        "Clean a suspicious network with a folder of clean images, and report.",
        "nba_lightning.app.owner:prepare",
    ),
    "scan": Command(
        "nba_lightning.app.owner:scan_command",
        "Look whether a class of a network is reached unusually easily.",
        "nba_lightning.app.owner:prepare",
    ),
    "demo": Command("nba_lightning.app.demo:demo", "Poison and clean a small network on real digits."),
    "report": Command("nba_lightning.app.report:report", "Write a cleaning's report.html anew.", positional=True),
}


def add_commands(parser: LightningArgumentParser, chosen: str | None) -> None:
    """Add them to the parser's subcommands; only the chosen one is imported and gets its options."""
    assert parser._subcommands_action is not None
    for name, command in COMMANDS.items():
        own = type(parser)(description=command.help)
        if name == chosen:
            own.add_function_arguments(resolve_name(command.function), as_positional=command.positional)
        parser._subcommands_action.add_subcommand(name, own, help=command.help)


def run_command(name: str, arguments: dict[str, Any]) -> None:
    """Call the function. What it returns as a number is the exit status."""
    status = resolve_name(COMMANDS[name].function)(**arguments)
    if isinstance(status, int) and status != 0:
        raise SystemExit(status)


def prepared(name: str, arguments: list[str]) -> list[str]:
    """The command's arguments as its parser takes them."""
    prepare = COMMANDS[name].prepare
    found: list[str] = arguments if prepare is None else resolve_name(prepare)(arguments)
    return found
