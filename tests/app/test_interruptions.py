"""Ctrl-C at any step of a cleaning keeps what is done, and the same command goes on from there to the same end."""

import json
from pathlib import Path

import pytest

from nba_lightning.app import clean, fits, steps, teachers
from nba_lightning.app.cli import main
from nba_lightning.data.owner import CleanImages
from tests.app.test_clean import COMMAND, CtrlC

INTERRUPTED = {
    "reading the images": (CleanImages, "setup"),
    "asking for the order of classes": (steps, "ask"),
    "the first scan": (steps, "run_scans"),
    "a teacher": (teachers, "FineTuning"),
    "taking the teacher": (teachers, "_take"),
    "the student": (fits, "NBA"),
    "pictures": (fits, "save_pictures"),
    "the second scan": (steps, "run_scans"),
    "accuracies": (steps, "accuracy_entry"),
    "writing report.json": (clean, "write_json"),
    "writing the page": (clean, "page_of"),
}


def interrupted(original):
    """A step that Ctrl-C ends: a fit after two of its own steps, anything else at once."""
    if not isinstance(original, type):
        return lambda *args, **kwargs: raise_it()

    class Interrupted(original):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), CtrlC()]

    return Interrupted


def raise_it():
    raise KeyboardInterrupt


def results(folder):
    """All that the cleaning left; of the state and the report what does not tell the time."""
    found = {path.name: path.read_bytes() for path in Path(folder).rglob("*.safetensors")}
    report = json.loads((Path(folder) / "report.json").read_text())
    return found, {name: value for name, value in report.items() if name != "seconds"}


def test_the_same_command_goes_on_after_ctrl_c_at_any_step(owner, monkeypatch, capsys):
    monkeypatch.setattr("nba_lightning.app.scans._STARTS", 1)
    command = [*COMMAND, "--scan=true"]
    main([*command, "--output=whole"])
    for step, (where, name) in INTERRUPTED.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted(getattr(where, name)))
            with pytest.raises(SystemExit) as end:
                main(command)
        assert end.value.code == 130, step
        assert "Interrupted" in capsys.readouterr().err, step
    done = json.loads(Path("cleaned/state.json").read_text())["done"]
    steps_done = {name.split(" of ")[0].split(" to ")[0].split(" 0")[0] for name in done}
    assert {"scan before", "teacher", "withstanding", "take", "student", "scan after", "accuracy"} <= steps_done
    main(command)
    assert results("cleaned") == results("whole")
    assert not Path("cleaned/fits").exists()
