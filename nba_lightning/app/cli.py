"""The command line: LightningCLI's ``fit``, ``validate``, ``test`` and ``predict``, and the commands of our own."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from nba_lightning import __version__
from nba_lightning.app.commands import COMMANDS, add_commands, prepared, run_command
from nba_lightning.app.configs import arranged, fitted_to_data, read_config
from nba_lightning.app.errors import CommandError, UsageError, explained
from nba_lightning.app.parser import Parser
from nba_lightning.app.quiet import quiet
from nba_lightning.app.runs import (
    KeepConfig,
    check_checkpoint,
    check_free,
    check_last,
    kept,
    own_interrupts,
    results_folder,
)
from nba_lightning.callbacks import PredictionWriter
from nba_lightning.core.checks import expected
from nba_lightning.io.checkpoints import BROKEN, SafeCheckpointIO

DESCRIPTION = """Implant backdoors into image classifiers and remove them.
`nba-lightning demo` does both to a small network, in about a minute."""


class NBALightningCLI(LightningCLI):
    """LightningCLI with checkpoints under ``--checkpoint``, configs by name and the commands of our own.

    Args:
        arguments: the arguments after the program's name.

    Raises:
        CommandError: whatever goes wrong, as a sentence.
    """

    def __init__(self, arguments: list[str]) -> None:
        names = [*self.subcommands(), *COMMANDS]
        self.chosen = next((argument for argument in arguments if argument in names), None)
        try:
            super().__init__(
                pl.LightningModule,
                pl.LightningDataModule,
                save_config_callback=KeepConfig,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                trainer_defaults={
                    "callbacks": [PredictionWriter()],
                    "enable_model_summary": False,
                    "plugins": [{"class_path": "nba_lightning.io.checkpoints.SafeCheckpointIO"}],
                },
                parser_class=Parser,
                parser_kwargs={"version": __version__, "prog": "nba-lightning", "description": DESCRIPTION},
                args=arguments,
            )
        except KeyboardInterrupt as error:
            raise CommandError(kept(getattr(self, "trainer", None)), 130) from error
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # as Lightning ends an interrupted fit
                raise CommandError(kept(getattr(self, "trainer", None)), 130) from end
            raise
        except CommandError:
            raise
        except Exception as error:
            config = self.config.as_dict().get(self.chosen) if hasattr(self, "config") else None
            raise CommandError(explained(error, config)) from error

    def setup_parser(self, add_subcommands: bool, main_kwargs: Any, subparser_kwargs: Any) -> None:
        """Add our own commands to Lightning's."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        add_commands(self.parser, self.chosen)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--checkpoint``: where checkpoints go and how many are kept."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.enable_version_counter": False})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--overwrite", type=bool, default=False, help="Replace the results of another run.")
        assert isinstance(parser, Parser)
        parser.shorten()
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the configs found by name and in the right order, before all flags."""
        self.config = parser.parse_args(_configs_first(args, self.chosen))

    def _parse_ckpt_path(self) -> None:
        # Lightning reads the checkpoint here once more, before there is a Trainer with its plugins.
        path = self.config[self.config.subcommand].get("ckpt_path")
        check_checkpoint(path)
        try:
            super()._parse_ckpt_path()
        except UsageError as error:
            raise expected("ckpt_path", "a checkpoint of this module", f"{path!r}. {explained(error)}") from error
        except BROKEN:
            SafeCheckpointIO().load_checkpoint(path)  # says what is wrong, and which checkpoint is not
            raise

    def _set_seed(self) -> None:
        if self.subcommand not in COMMANDS:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Make module, data and Trainer; a command of our own makes what it needs."""
        if self.subcommand not in COMMANDS:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in COMMANDS:
            run_command(subcommand, self.parser.instantiate_classes(self.config)[subcommand].as_dict())
        else:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Spare the results of other runs."""
        check_free(self.trainer, self._get(self.config, "ckpt_path"), self._get(self.config, "overwrite"))

    def before_validate(self) -> None:
        """Ask for the checkpoint before the images."""
        check_last(self.trainer, self._get(self.config, "ckpt_path"))

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Say where the checkpoints are."""
        folder = results_folder(self.trainer)
        if (folder / "last.ckpt").exists() and not getattr(self.trainer, "fast_dev_run", False):
            rank_zero_info(f"Checkpoints: {folder}")


def _configs_first(arguments: list[str], subcommand: str | None) -> list[str]:
    """Put a subcommand's configs before its flags, found and arranged; the class that none names before them."""
    if subcommand is None:
        return arguments
    if subcommand in COMMANDS:
        start = arguments.index(subcommand) + 1
        return [*arguments[:start], *prepared(subcommand, arguments[start:])]
    start = arguments.index(subcommand) + 1
    search = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    search.add_argument("-c", "--config", action="append", default=[])
    search.add_argument("--model", action="append", default=[])
    search.add_argument("--data", action="append", default=[])
    try:
        found, rest = search.parse_known_args(arguments[start:])
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    configs = arranged(found.config, [part for part in ("model", "data") if getattr(found, part)])
    configs = fitted_to_data(configs, found.data)
    contents = [read_config(config) for config in configs]
    before: list[str] = []
    after: list[str] = []
    for part in ("model", "data"):
        named = any("class_path" in content.get(part, {}) for content in contents if content.get(part))
        for value in getattr(found, part):
            (after if named else before).extend([f"--{part}", value])
    flags = [argument for config in configs for argument in ("--config", config)]
    return [*arguments[:start], *before, *flags, *after, *rest]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments; ``None`` takes those of the process.
    """
    # Lightning reads local checkpoints without unpickling code; this holds for remote ones too.
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a network in a file of the owner's; `python -m` does it, a script does not
    try:
        with quiet(), own_interrupts():
            NBALightningCLI(list(sys.argv[1:] if args is None else args))
    except CommandError as error:
        if os.environ.get("NBA_LIGHTNING_TRACEBACK") and error.__cause__ is not None:
            raise error.__cause__ from error.__cause__.__cause__
        if error.status == 1:
            sys.exit(f"Error: {error}")
        print(error, file=sys.stderr)
        sys.exit(error.status)
