"""Whatever goes wrong is one sentence."""

import errno
import os
import signal

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from nba_lightning.app import cli
from nba_lightning.app.cli import main
from nba_lightning.app.errors import ADVICE, explained
from nba_lightning.training import Classifier

BASE = ["--config", "digits", "--config", "badnets", "--config", "defense/none", "--config", "small_cnn_digits"]
QUICK = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def failing(*arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return str(end.value.code)


def failing_fit(*arguments):
    return failing("fit", *BASE, *QUICK, "--trainer.fast_dev_run=1", *arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.attack.size=-4"], "Expected `size` to be at least 1, but got -4. (--data.attack.size)"),
        (["--model.lr=-1"], "Expected `lr` to be in (0, inf], but got -1.0. (--model.lr)"),
        (["--model.model.width=-1"], "Expected `width` to be at least 1, but got -1. (--model.model.width)"),
        (["--data.attack.size=abc"], "Expected `--data.attack.size` to be int, but got 'abc'."),
        (
            ["--data.train_on=poison"],
            "Expected `--data.train_on` to be one of poisoned, clean, untriggered, but got 'poison'.",
        ),
        (["--data.attack=BadNet"], "Expected `--data.attack` to name a class, but got 'BadNet'. Did you mean BadNets"),
        (["--data.attack=nba_lightning.attacks.BadNet"], "got 'nba_lightning.attacks.BadNet'. Did you mean BadNets"),
        (["--data.attack=nba_lightnin.attacks.BadNets"], "(No module named 'nba_lightnin'). Did you mean BadNets?"),
        (["--data.attack=SmallCNN"], "Expected `--data.attack` to name a class, but got 'SmallCNN'."),
        (["--data.attack=nba_lightning.networks.SmallCNN"], "to be a subclass of Attack, but got 'nba_lightning.net"),
        (["--model=NBB"], "Expected `--model` to name a class, but got 'NBB'. Did you mean NBA?"),
        (["--model.model=SmalCNN"], "Expected `--model.model` to name a class, but got 'SmalCNN'. Did you mean SmallC"),
        (["--model.lrr=1"], "Expected an argument of Classifier, but got 'lrr' (`--model`). Did you mean lr?"),
        (
            ["--data.attack.positions=1"],
            "Expected an argument of BadNets, but got 'positions' (`--data.attack`). Did you mean p",
        ),
        (
            ["--trainer.max_epochz=1"],
            "Expected an option of this command, but got '--trainer.max_epochz'. Did you",
        ),
        (["--trainer.precision=17"], "Expected `--trainer.precision` to be one of 64, 32, 16, transformer-engine"),
        (["--trainer.devices=-3"], f"should be an int > 0.\n{ADVICE}"),
        (["--trainer.strategy=nothing"], "You selected an invalid strategy name"),
        (
            ["--ckpt_path=nowhere.ckpt"],
            "Expected `ckpt_path` to be an existing checkpoint, last or best, but got",
        ),
        (["--ckpt_path=."], "Expected `ckpt_path` to be a checkpoint file, last or best, but got the folder '.'"),
        (["--config"], "expected one argument"),
    ],
)
def test_errors_of_arguments_name_the_option(arguments, sentence):
    said = failing_fit(*arguments)
    assert said.startswith("Error: ")
    assert sentence in said
    assert len(said.splitlines()) <= 2
    assert "Namespace" not in said


def test_errors_of_a_config_name_the_option(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {class_path: NBB}\n")
    said = failing("fit", *BASE, "--config", str(tmp_path / "mine.yaml"))
    assert said.startswith("Error: Expected `--model` to name a class, but got 'NBB'")
    (tmp_path / "mine.yaml").write_text("data: {init_args: {attack: {init_args: {sizes: 1}}}}\n")
    said = failing("fit", *BASE, "--config", str(tmp_path / "mine.yaml"))
    assert "Expected an argument of BadNets, but got 'sizes' (`--data.attack`). Did you mean size?" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Expected one of fit, validate, test, predict, clean, scan, demo, report first"),
        (["fitt"], "but got 'fitt'. Did you mean fit?"),
        (["fit"], "Expected `--data` and `--model`, or a `--config` that gives it"),
        (["demo", "--outputt", "x"], "Expected an option of this command, but got '--outputt'. Did you mean --output?"),
    ],
)
def test_errors_of_commands(arguments, sentence):
    assert sentence in failing(*arguments)


FULL = "No space left on the disk ([Errno 28] No space left on device{}). What was written before is kept."


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MisconfigurationException("no such thing"), "no such thing"),
        (Image.DecompressionBombError("too many pixels"), "too many pixels"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Permission denied: 'a/b'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "Is a directory: 'a'"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "Not a directory: 'a'"),
        (
            OSError(errno.ENOSPC, "No space left on device", "tmp", None, "a"),
            FULL.format(": 'tmp' -> 'a'"),
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            FULL.format(""),
        ),
        (ValueError("Expected `a` to be b, but got c."), "Expected `a` to be b, but got c."),
        (AttributeError("a bug"), f"AttributeError: a bug\n{ADVICE}"),
        (ValueError("of somebody else"), f"ValueError: of somebody else\n{ADVICE}"),
    ],
)
def test_errors_of_a_run(error, sentence, monkeypatch):
    def fail(*args):
        raise error

    assert explained(error) == sentence
    monkeypatch.setattr(Classifier, "configure_optimizers", fail)
    assert failing_fit() == f"Error: {sentence}"


def test_the_error_of_a_loading_process_is_said_without_its_traceback():
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "a.py", line 3, in f\n    raise ValueError(x)\nValueError: Expected `a` to be b, but got c.\n'
    )
    assert explained(ValueError(text)) == "Expected `a` to be b, but got c."


def test_an_argument_is_named_only_if_it_is_the_only_one():
    error = ValueError("Expected `seed` to be 1, but got 2.")
    config = {"model": {"class_path": "x", "init_args": {"seed": 2}}, "data": {"init_args": {"seed": 3}}}
    assert explained(error, config).endswith("(--model.seed)")
    config["data"]["init_args"]["seed"] = 2
    assert explained(error, config) == str(error)


def test_the_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("NBA_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Expected `lr` to be"):
        main(["fit", *BASE, *QUICK, "--model.lr=-1"])


def test_a_checkpoint_of_another_module_is_said(tmp_path):
    fit = ["fit", *QUICK, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1"]
    main([*fit, *BASE, f"--checkpoint.dirpath={tmp_path}"])
    image_folder = ["--config", "digits", "--config", "steganography", "--config", "ssba"]
    said = failing(*fit, *image_folder, f"--ckpt_path={tmp_path / 'last.ckpt'}")
    assert said.startswith("Error: Expected ")
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize("after", [False, True])
def test_an_interruption_says_what_is_kept(after, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = Classifier.training_step

    def interrupted(self, *args):
        if self.current_epoch == int(after):
            raise KeyboardInterrupt
        return start(self, *args)

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        main(["fit", *BASE, *QUICK, f"--checkpoint.dirpath={tmp_path}", "--trainer.max_epochs=2"])
    assert end.value.code == 130
    said = capsys.readouterr().err
    wanted = (
        f"Kept is {tmp_path / 'last.ckpt'}; the same command with `--ckpt_path last`" if after else "nothing was kept"
    )
    assert wanted in said
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interruption_before_the_run_has_its_status_too(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "arranged", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["fit", *BASE])
    assert end.value.code == 130


@pytest.mark.parametrize("option", ["checkpoint.dirpath", "trainer.default_root_dir"])
def test_a_folder_that_cannot_be_one_is_refused_before_training(option, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    said = failing("fit", *BASE, *QUICK, f"--{option}=file/x", "--trainer.max_epochs=1")
    assert f"Expected `--{option}` to be a folder, but got '" in said
    assert said.endswith("file' is a file.")
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "that may be written" in failing("fit", *BASE, *QUICK, f"--{option}=locked/x", "--trainer.max_epochs=1")
