"""The command line: LightningCLI's ``fit``, ``validate``, ``test`` and ``predict``, and a ``demo``."""

import os
import sys
from collections.abc import Sequence

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from nba_lightning import __version__
from nba_lightning.callbacks import NonFiniteLossError, PredictionWriter
from nba_lightning.io.checkpoints import BROKEN, SafeCheckpointIO

DESCRIPTION = """Implant backdoors into image classifiers and remove them.
`nba-lightning demo` does both to a small network, in about a minute."""


class NBALightningCLI(LightningCLI):
    """LightningCLI with a checkpoint callback under ``--checkpoint``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--checkpoint``: where checkpoints go and how many are kept."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.enable_version_counter": False})

    def _parse_ckpt_path(self) -> None:
        # Lightning reads the checkpoint here once more, before there is a Trainer with its plugins.
        try:
            super()._parse_ckpt_path()
        except BROKEN:
            path = self.config[self.config.subcommand].ckpt_path
            SafeCheckpointIO().load_checkpoint(path)  # says what is wrong, and which checkpoint is not
            raise


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments; ``None`` takes those of the process.
    """
    # Lightning reads local checkpoints without unpickling code; this holds for remote ones too.
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        if arguments[:1] == ["demo"]:
            _demo(arguments[1:])
        else:
            _lightning(None if args is None else arguments)
    except (ValueError, FileNotFoundError, NonFiniteLossError) as error:
        if os.environ.get("NBA_LIGHTNING_TRACEBACK"):
            raise
        sys.exit(f"Error: {error}")


def _lightning(arguments: list[str] | None) -> None:
    NBALightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "callbacks": [PredictionWriter()],
            "plugins": [{"class_path": "nba_lightning.io.checkpoints.SafeCheckpointIO"}],
        },
        parser_kwargs={"version": __version__, "prog": "nba-lightning", "description": DESCRIPTION},
        args=arguments,
    )


def _demo(arguments: list[str]) -> None:
    from nba_lightning.app.demo import demo

    parser = ArgumentParser(prog="nba-lightning demo", description="Poison and clean a small network on real digits.")
    parser.add_function_arguments(demo)
    demo(**vars(parser.parse_args(arguments)))
