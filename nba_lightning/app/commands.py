"""The subcommands that are functions. A new one is a line in this table."""

from pkgutil import resolve_name
from typing import Any, NamedTuple

from lightning.pytorch.cli import LightningArgumentParser


class Command(NamedTuple):
    """A function whose arguments are the options: where it is (imported when it is called), and what it does."""

    function: str
    help: str
    positional: bool = False
    """Whether arguments without a default are given without their names."""


COMMANDS = {
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
