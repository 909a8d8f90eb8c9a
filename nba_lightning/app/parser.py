"""The parser: errors are raised, and help fits on two screens."""

import argparse
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from nba_lightning.app.errors import UsageError

USUAL: dict[str, dict[str, str]] = {
    "what to run": {
        "--config NAME": "a YAML file, or a shipped config by name: nba, defense/nba, digits, badnets. "
        "Give as many as you like: later ones override earlier ones, flags override all.",
        "--model CLASS": "the module, such as NBA; `--model.help NBA` shows its arguments (`--model.lr`, ...)",
        "--model.weights FILE": "the suspicious weights",
        "--data CLASS": "the images; `--data.help BackdoorDataModule` shows its arguments (`--data.batch_size`, ...)",
        "--data.source CLASS": "where images come from: Digits, Torchvision, ImageFolderSource",
        "--data.attack CLASS": "the attack, `null` for none",
        "--seed_everything N": "seed of what no part seeds itself (default: 0)",
        "--print_config": "print the whole configuration and exit",
    },
    "how to run it": {
        "--trainer.max_epochs N": "epochs",
        "--trainer.max_time DD:HH:MM:SS": "stop after this time",
        "--trainer.accelerator NAME": "cpu, gpu or auto (default: auto)",
        "--trainer.devices N": "how many, or which",
        "--trainer.num_nodes N": "machines",
        "--trainer.strategy NAME": "such as ddp",
        "--trainer.precision NAME": "such as bf16-mixed",
        "--trainer.default_root_dir DIR": "where logs go (and checkpoints without a folder of their own)",
        "--trainer.logger CLASS": "false for none",
        "--trainer.callbacks+ CLASS": "one more callback, such as EarlyStopping",
        "--trainer.fast_dev_run N": "run N batches only, write nothing",
        "--trainer.enable_progress_bar BOOL": "show it (default: true)",
        "--trainer.enable_model_summary BOOL": "print the layers (default: false)",
    },
    "what is kept": {
        "--checkpoint.dirpath DIR": "where checkpoints and cleaned weights go",
        "--checkpoint.monitor NAME": "keep the checkpoint that is best by this metric, such as val/acc",
        "--checkpoint.every_n_train_steps N": "write one every N steps",
        "--ckpt_path FILE": "a checkpoint to go on from or to look at; `last` finds the newest of the folder",
        "--overwrite BOOL": "fit into a folder that holds another run's results (default: false)",
    },
}
"""The options that the short help shows."""


class Parser(LightningArgumentParser):
    """Lightning's parser, but an error is an exception, and ``--help`` shows the usual options only."""

    short = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage, which has more lines than a screen."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UsageError(message, list(self._option_string_actions)) from ex

    def shorten(self) -> None:
        """Let ``--help`` show the usual options and ``--help.all`` all of them."""
        self.short = True
        self.add_argument("--help.all", action=_HelpAll, help="Show all options and exit.")

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text, short or whole."""
        return _short_help(self) if self.short else super().format_help(*args, **kwargs)


class _HelpAll(argparse._HelpAction):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        assert isinstance(parser, Parser)
        parser.short = False
        super().__call__(parser, *args, **kwargs)


def _short_help(parser: Parser) -> str:
    """Format the usual options with plain argparse; jsonargparse lists every known class beside them."""
    prog = parser.prog.replace(" [options]", "")
    shown = argparse.ArgumentParser(
        prog, f"{prog} --config NAME [--config NAME ...] [options]", parser.description, add_help=False
    )
    for title, options in USUAL.items():
        group = shown.add_argument_group(title)
        for option, text in options.items():
            name, *metavar = option.split(" ")
            if name in parser._option_string_actions or name.startswith(("--model.", "--data.")):
                value = {"metavar": metavar[0]} if metavar else {"action": "store_true"}
                group.add_argument(name, help=text, **value)  # type: ignore[arg-type]
    group = shown.add_argument_group("more")
    group.add_argument("--help", action="store_true", help="this")
    group.add_argument("--help.all", action="store_true", help="all options of the Trainer and of checkpoints too")
    group.add_argument("--model.help CLASS", action="store_true", help="the arguments of a module")
    group.add_argument("--data.help CLASS", action="store_true", help="the arguments of a data module")
    return shown.format_help()
