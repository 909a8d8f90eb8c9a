"""Runs spare each other's results; help and start-up show what matters."""

import re
import subprocess
import sys

import pytest
import yaml

from nba_lightning.app.cli import main
from nba_lightning.app.commands import COMMANDS, Command
from nba_lightning.app.parser import USUAL

PARTS = ["--config", "digits", "--config", "badnets", "--config", "fine_tuning", "--config", "small_cnn_digits"]
QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.batch_size=16"]


def fit(tmp_path, *arguments, logger="false", epochs=1):
    places = [f"--checkpoint.dirpath={tmp_path / 'run'}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *PARTS, *QUICK, *places, f"--trainer.logger={logger}", f"--trainer.max_epochs={epochs}", *arguments])


def test_a_second_fit_spares_the_results_of_the_first(tmp_path):
    fit(tmp_path)
    results = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {"last.ckpt", "cleaned.safetensors"} <= results.keys()
    with pytest.raises(SystemExit, match=r"last.ckpt and cleaned.safetensors of another run. Use `--ckpt_path last`"):
        fit(tmp_path, "--model.lr=0.01")
    (tmp_path / "run" / "last.ckpt").unlink()
    with pytest.raises(SystemExit, match=r"with cleaned.safetensors of another run"):
        fit(tmp_path, "--model.lr=0.01")
    left = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert left == {name: content for name, content in results.items() if name != "last.ckpt"}


def test_it_goes_on_or_overwrites_where_that_is_asked_for(tmp_path):
    fit(tmp_path)
    first = (tmp_path / "run" / "cleaned.safetensors").read_bytes()
    fit(tmp_path, "--ckpt_path=last", epochs=2)
    second = (tmp_path / "run" / "cleaned.safetensors").read_bytes()
    assert second != first
    fit(tmp_path, "--overwrite=true")
    assert (tmp_path / "run" / "cleaned.safetensors").read_bytes() == first


def test_checkpoints_without_a_folder_of_their_own_are_spared_too(tmp_path):
    places = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1"]
    main(["fit", *PARTS, *QUICK, *places])
    main(["fit", *PARTS, *QUICK, *places])  # the logger numbers its folders
    assert len(list(tmp_path.rglob("cleaned.safetensors"))) == 2
    main(["fit", *PARTS, *QUICK, *places, "--trainer.logger=false"])
    with pytest.raises(SystemExit, match="folder without results"):
        main(["fit", *PARTS, *QUICK, *places, "--trainer.logger=false"])


def test_a_fast_dev_run_may_be_anywhere(tmp_path):
    fit(tmp_path)
    fit(tmp_path, "--trainer.fast_dev_run=1")


def test_a_job_that_slurm_queued_again_goes_on(tmp_path, monkeypatch):
    fit(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # as in an interactive job, which Lightning leaves alone
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes((tmp_path / "run" / "last.ckpt").read_bytes())
    fit(tmp_path, epochs=2)


def test_last_without_a_checkpoint_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, "--ckpt_path=last")
    assert f"There is no last.ckpt in {tmp_path / 'run'}: this fit starts from the beginning." in caplog.text
    assert f"Checkpoints: {tmp_path / 'run'}" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, "--ckpt_path=last", epochs=2)
    assert "There is no last.ckpt" not in caplog.text


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_of_a_last_checkpoint_that_is_missing_is_refused(command, tmp_path):
    places = [f"--checkpoint.dirpath={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit, match="Expected `--checkpoint.dirpath` to be a folder with last.ckpt"):
        main([command, *PARTS, *QUICK, *places, "--ckpt_path=last"])


def test_configurations_are_numbered_and_only_a_fit_writes_one(tmp_path):
    fit(tmp_path, "--overwrite=true")
    first = (tmp_path / "config.yaml").read_text()
    main(["test", *PARTS, *QUICK, f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"])
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["config.yaml"]
    fit(tmp_path, "--ckpt_path=last", epochs=2)
    assert (tmp_path / "config.yaml").read_text() == first
    assert yaml.safe_load(first)["overwrite"] is False
    assert yaml.safe_load((tmp_path / "config-1.yaml").read_text())["trainer"]["max_epochs"] == 2
    config = ["--config", str(tmp_path / "config-1.yaml"), f"--checkpoint.dirpath={tmp_path / 'again'}"]
    main(["fit", *config, "--ckpt_path=null", "--trainer.max_epochs=1"])  # a written configuration makes a run
    assert (tmp_path / "again" / "last.ckpt").exists()


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_fits_on_two_screens_and_all_of_it_is_there(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short = helped(capsys, command, "--help")
    assert len(short.splitlines()) <= 100
    assert ("--overwrite" in short) == (command == "fit")
    everything = helped(capsys, command, "--help.all")
    assert "--trainer.accumulate_grad_batches" in everything
    assert "--trainer.accumulate_grad_batches" not in short
    skipped = ("--model.", "--data.") if command == "fit" else ("--model.", "--data.", "--overwrite")
    for option in (name.split(" ")[0] for group in USUAL.values() for name in group):
        assert option.startswith(skipped) or option in everything, f"{option} is no option"
        assert option in short or option == "--overwrite"


def test_help_of_a_class_and_of_our_own_commands(capsys):
    assert "--model.pseudo_share" in helped(capsys, "fit", "--model.help", "NBA")
    top = helped(capsys, "--help")
    for name, command in COMMANDS.items():
        assert re.search(rf"^    {name} +{command.help[:20]}", top, re.MULTILINE)
    assert "--attack {badnets,blended}" in helped(capsys, "demo", "--help")


@pytest.mark.parametrize("command", ["clean", "scan", "demo", "report"])
def test_help_of_our_own_commands_fits_on_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = helped(capsys, command, "--help")
    assert len(shown.splitlines()) <= 100
    assert COMMANDS[command].help.split(".")[0] in " ".join(shown.split())


def test_a_command_is_a_line_in_the_table_and_is_imported_when_it_is_called(tmp_path, monkeypatch, capsys):
    (tmp_path / "probe.py").write_text(
        "def probe(status: int, word: str = 'none'):\n"
        "    if status < 0:\n        raise ValueError(f'Expected `status` to be at least 0, but got {status}.')\n"
        "    print(word)\n    return status\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "missing", Command("no_such_module:function", "Never called."))
    monkeypatch.setitem(COMMANDS, "probe", Command("probe:probe", "Says a word."))
    assert re.search(r"missing +Never called\.\n +probe +Says a word\.", helped(capsys, "--help"))
    main(["probe", "--status=0", "--word=yes"])
    assert capsys.readouterr().out == "yes\n"
    with pytest.raises(SystemExit) as end:
        main(["probe", "--status=3"])
    assert end.value.code == 3
    with pytest.raises(SystemExit, match=r"Error: Expected `status` to be at least 0, but got -1\. \(--status\)"):
        main(["probe", "--status=-1"])


def test_start_up_prints_what_is_ours(tmp_path):
    command = [sys.executable, "-m", "nba_lightning", "fit", *PARTS, *QUICK, "--trainer.max_epochs=1"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=100)
    assert run.stdout == ""
    *first, stopped, cleaned, checkpoints = run.stderr.splitlines()
    untrained = next(line for line in first if "suspicious network" in line)
    assert any("steps" in line for line in first)  # what the fit will cost
    assert "no better than chance" in untrained  # the network of this command has no weights
    assert stopped == "`Trainer.fit` stopped: `max_epochs=1` reached."
    assert cleaned.startswith("Cleaned weights: ")
    assert checkpoints.startswith("Checkpoints: ")
