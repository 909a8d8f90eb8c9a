"""The last fit of ``nba-lightning clean``: what is suspected is unlearned, unless it costs too much."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from nba_lightning import NBA, Unlearning
from nba_lightning.app import fits, unlearning
from nba_lightning.app.cli import main
from nba_lightning.app.unlearning import _good, fit_unlearning
from nba_lightning.core.features import predict
from nba_lightning.networks import SmallCNN
from tests.app.test_clean import COMMAND, report
from tests.helpers import drifted


class Suspecting(NBA):
    """Suspects red, the last of the classes."""

    def _verify(self):
        super()._verify()
        self.verification.suspected = self.verification.to_unlearn = [2]


@pytest.fixture
def suspecting(owner, monkeypatch):
    monkeypatch.setattr(fits, "NBA", Suspecting)
    return owner


def student():
    return load_file("cleaned/fits/student.safetensors")


@pytest.fixture
def kept(monkeypatch):
    """The fits' folder stays."""
    monkeypatch.setattr("nba_lightning.app.clean.shutil.rmtree", lambda *args, **kwargs: None)


def test_what_reaches_a_suspected_class_is_unlearned_from_the_student_on(suspecting, kept, monkeypatch, capsys):
    seen = []

    class Watched(Unlearning):
        def __init__(self, network, **kwargs):
            super().__init__(network, **kwargs)
            seen.append((kwargs["classes"], kwargs["start"].state_dict(), kwargs["teacher"].state_dict(), self.lr))

    monkeypatch.setattr(unlearning, "Unlearning", Watched)
    main([*COMMAND, "--progress=true"])
    ((classes, start, teacher, rate),) = seen
    assert classes == [2]
    came, taught = student(), load_file("cleaned/teacher.safetensors")
    assert all(torch.equal(came[name.removeprefix("network.")], value) for name, value in start.items() if "fc" in name)
    assert all(torch.equal(taught[name.removeprefix("network.")], v) for name, v in teacher.items() if "fc" in name)
    assert not torch.equal(load_file("cleaned/cleaned.safetensors")["fc.weight"], came["fc.weight"])
    chosen = report()["chosen"]
    assert rate == min(chosen["rate"], 0.005)
    assert chosen["suspected"] == ["red"]
    assert chosen["unlearned"] == f"what reaches red, in 20 steps at rate {rate:g}"
    assert "perturbations and patches" in chosen["reasons"]["unlearned"]
    assert {row["fit"] for row in report()["curves"]} >= {"unlearning"}
    said = capsys.readouterr().out
    assert "5/6 and: what only the suspicious network falls for is unlearned\n  20 steps of 18 images" in said
    assert "  unlearned: what reaches red" in said


class RuinedUnlearning(Unlearning):
    def training_step(self, batch, batch_idx):
        images, labels = self.unpack(batch, batch_idx)
        return 100 * F.cross_entropy(predict(self.model, images), (labels + 1) % 3)


class EndlessUnlearning(Unlearning):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("inf")


@pytest.mark.parametrize(
    ("module", "said"),
    [(RuinedUnlearning, "nothing: it cost too much accuracy. Rejected"), (EndlessUnlearning, "nothing: Expected")],
)
@pytest.mark.filterwarnings("ignore:Rejected")
def test_the_student_stays_where_unlearning_ruins_it(suspecting, kept, monkeypatch, module, said):
    monkeypatch.setattr(unlearning, "Unlearning", lambda *args, **kwargs: module(*args, **(kwargs | {"lr": 0.5})))
    main([*COMMAND, "--student_steps=100"])
    cleaned = load_file("cleaned/cleaned.safetensors")
    assert all(torch.equal(cleaned[name], value) for name, value in student().items())
    assert report()["chosen"]["unlearned"].startswith(said)
    assert report()["accuracy"]["cleaned"]["value"] == 1.0
    assert report()["weights"]["handed_over"] is True
    assert not Path("cleaned/rejected.safetensors").exists()


def test_nothing_is_unlearned_where_nothing_is_suspected(owner):
    main(COMMAND)
    assert "unlearned" not in report()["chosen"]
    assert "suspected" not in report()["chosen"]


class CtrlC(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise KeyboardInterrupt


class Interrupted(Unlearning):
    def configure_callbacks(self):
        return [*super().configure_callbacks(), CtrlC()]


def test_ctrl_c_keeps_the_student_and_the_command_goes_on(suspecting, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(unlearning, "Unlearning", Interrupted)
        with pytest.raises(SystemExit) as end:
            main(COMMAND)
    assert end.value.code == 130
    came = load_file("cleaned/cleaned.safetensors")
    assert all(torch.equal(came[name], value) for name, value in student().items())
    assert "student of" in str(json.loads(Path("cleaned/state.json").read_text())["done"].keys())
    main(COMMAND)
    assert report()["chosen"]["unlearned"].startswith("what reaches red")
    assert not torch.equal(load_file("cleaned/cleaned.safetensors")["fc.weight"], came["fc.weight"])


@pytest.mark.parametrize(
    ("verdict", "right", "taken", "suspected"),
    [
        ("accepted", 0.79, True, {"suspected": ["b"]}),
        ("accepted", 0.79, True, {}),
        ("rejected", 0.79, False, {"suspected": ["b"]}),
        ("accepted", 0.7, False, {"suspected": ["b"]}),
    ],
)
def test_it_takes_the_student_s_place_if_neither_guard_nor_accuracy_speaks_against_it(
    tmp_path, verdict, right, taken, suspected
):
    figures = {"student": {"value": right}, "suspicious": {"value": 0.8, "images": 1000}}

    class Link(SimpleNamespace):
        def fit(self, module, to):
            to.parent.mkdir()
            to.write_text("unlearned")
            return {"verdict": verdict, "sentence": "So.", "accuracies": figures, "curve": [2], "file": to.name} | {
                "chosen": {"steps": 9}
            }

        def cost(self):
            return "cheap"

    data = SimpleNamespace(classes=["a", "b"])
    link = Link(name="unlearning", folder=tmp_path / "fit", data=data, max_loss=0.05)
    chain = SimpleNamespace(folder=tmp_path, step=lambda name, work: work())
    (tmp_path / "cleaned.safetensors").write_text("student")
    last = {
        "chosen": {"rate": 0.1, **suspected},
        "to_unlearn": [1] if suspected else [0, 1],
        "accuracies": {"student": {"value": 0.8}},
        "curve": [1],
    }
    last |= {"file": "cleaned.safetensors", "sentence": "Before."}
    network = SmallCNN(width=4, in_channels=1)
    found = fit_unlearning(network, drifted(network), drifted(network, seed=2), last, link, chain, 0, False)
    assert (tmp_path / "cleaned.safetensors").read_text() == ("unlearned" if taken else "student")
    assert found["curve"] == ([1, 2] if taken else [1])
    assert found["sentence"] == ("So." if taken else "Before.")
    reached = "b" if suspected else "any of 2 classes"
    told = f"what reaches {reached}, in 9 steps at rate 0.005" if taken else "nothing: it cost too much accuracy. So."
    assert found["chosen"] == {"rate": 0.1, **suspected, "unlearned": told}
    assert not link.folder.exists()


@pytest.mark.parametrize(("reached", "left"), [(0.9, 0.2), (0.1, 0.1)])
def test_what_is_still_reached_is_said(suspecting, monkeypatch, reached, left):
    class Reached(Unlearning):
        def _still_reached(self):
            return left if self._ended else reached

    monkeypatch.setattr(unlearning, "Unlearning", Reached)
    main(COMMAND)
    no_guide = "; the teacher was no guide, since what is crafted on it alone led what was kept there 90 % as"
    assert (no_guide in report()["chosen"]["unlearned"]) is (reached > 0.5)
    led = "What is crafted on it alone led what verification kept to red 90 % as easily as the suspicious network,"
    now = "What is crafted on the cleaned network leads there 20 % as easily now, and what else is left nothing shows."
    told = [warning for warning in report()["warnings"] if warning.startswith(led) and now in warning]
    assert len(told) == (reached > 0.5)


def test_figures_of_held_out_images_decide_where_there_are_any():
    def figures(value):
        return {"student": {"value": value}, "suspicious": {"value": 0.8, "images": 1000}}

    assert _good(figures(0.76), figures(0.8), 0.05)
    assert not _good(figures(0.76), figures(0.8), 0.03)
    assert _good({}, {}, 0.05)
