"""``nba-lightning clean``: from a folder of images to a cleaned network, or a sentence that says why not."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file

import nba_lightning
from nba_lightning import NBA, FineTuning
from nba_lightning.app import fits, steps, teachers
from nba_lightning.app.clean import _aligned
from nba_lightning.app.cli import main
from nba_lightning.app.steps import Cleaning
from nba_lightning.core.features import predict
from nba_lightning.networks import SmallCNN
from nba_lightning.training import sweep
from tests.app.conftest import write_images

NETWORK = [
    "--network",
    "mine.Colours",
    "--network.num_classes=3",
    "--mean",
    "[0.5,0.5,0.5]",
    "--std",
    "[0.25,0.25,0.25]",
]
QUICK = ["--teacher-steps", "10", "--student_steps=10", "--device=cpu", "--progress=false", "--scan=false"]
COMMAND = ["clean", *NETWORK, *QUICK, "--weights", "suspicious.safetensors", "--images", "images"]


class Ruined(NBA):
    """Learns what is wrong."""

    def training_step(self, batch, batch_idx):
        images, labels = self.unpack(batch, batch_idx)
        return F.cross_entropy(predict(self.model, images), (labels + 1) % 3)

    def _verify(self):
        """Verification would give the teacher back."""
        self.accepted.fill_(1.0)


class RuinedTeacher(FineTuning):
    """Learns what is wrong, at high rates."""

    def training_step(self, batch, batch_idx):
        images, labels = self.unpack(batch, batch_idx)
        return F.cross_entropy(predict(self.model, images), (labels + (self.lr > 0.06)) % 3)


def report(folder="cleaned"):
    return json.loads((Path(folder) / "report.json").read_text())


def test_it_leaves_a_cleaned_network_and_a_report(owner):
    before = (owner / "suspicious.safetensors").read_bytes()
    main([*COMMAND, "--scan=true"])
    found = report()
    assert set(found) >= {"accuracy", "scan", "chosen", "warnings", "versions", "seconds", "seed"}
    assert set(found["accuracy"]) == {"suspicious", "teacher", "cleaned"}
    for entry in found["accuracy"].values():
        assert entry["images"] == 18
        assert entry["held_out"] is True
        assert entry["value"] == 1.0
        assert [one["class"] for one in entry["per_class"]] == ["blue", "green", "red"]
    assert set(found["scan"]) == {"before", "after"}
    for part in found["scan"].values():
        for rows in part["classes"].values():
            assert [set(row) for row in rows] == [{"class", "statistic", "p_value"}] * 3
        assert part["verdict"].keys() == part["classes"].keys()
    assert {"optimiser", "rate", "steps", "batch", "layers"} <= set(found["chosen"])
    assert found["chosen"]["layers"] == ["first"]
    assert found["chosen"]["reasons"].keys() == {
        *("optimiser", "rate", "teacher_rate", "steps", "batch", "layers", "accepted")
    }
    assert found["chosen"]["rate"] == pytest.approx(found["chosen"]["teacher_rate"] / 3)
    assert found["chosen"]["reasons"]["rate"] == "A third of the teacher's."
    assert "at least the 10 steps that were asked for" in found["chosen"]["reasons"]["steps"]
    assert json.loads(Path("cleaned/report/attention.json").read_text())["layer"] == "first"  # not `network.first`
    samples = json.loads(Path("cleaned/report/pseudo.json").read_text())["samples"]
    assert {sample["source"] for sample in samples} == {"trigger families"}
    assert not any("no pictures" in warning for warning in found["warnings"])
    assert "The teacher was to be fitted for 10 steps, by default it is 450. A shorter fit" in found["warnings"][0]
    assert Path("cleaned/report/pseudo.safetensors").is_file()
    assert found["weights"]["network"] == "mine.Colours"
    assert found["weights"]["arguments"] == {"num_classes": 3}
    came, cleaned = load_file("suspicious.safetensors"), load_file("cleaned/cleaned.safetensors")
    assert {name: value.dtype for name, value in cleaned.items()} == {n: v.dtype for n, v in came.items()}
    assert not torch.equal(cleaned["fc.weight"], came["fc.weight"])
    assert (owner / "suspicious.safetensors").read_bytes() == before
    assert Path("cleaned/teacher.safetensors").is_file()
    assert not Path("cleaned/fits").exists()
    assert "mine" in Path("cleaned/report.html").read_text()


def test_the_same_command_goes_on_and_another_is_refused(owner, monkeypatch):
    main(COMMAND)
    before = {path.name: path.read_bytes() for path in Path("cleaned").glob("*.safetensors")}
    seconds = report()["seconds"]
    main(COMMAND)
    assert {path.name: path.read_bytes() for path in Path("cleaned").glob("*.safetensors")} == before
    assert report()["seconds"] == seconds
    with pytest.raises(SystemExit, match=r"another run's results, .* other arguments: `max_loss` was 0.05, is 0.1\."):
        main([*COMMAND, "--max-loss", "0.1"])
    with monkeypatch.context() as patch:
        patch.setattr("nba_lightning.app.clean.__version__", "9.0.0")
        with pytest.raises(SystemExit, match=r'other arguments: `version` was ".*", is "9\.0\.0"\.'):
            main(COMMAND)
    write_images(owner / "images", 31)
    with pytest.raises(SystemExit, match=r"other arguments: `held_out` was 18, is 18|`images_hash` was"):
        main(COMMAND)
    (owner / "cleaned" / "state.json").unlink()
    with pytest.raises(SystemExit, match=r"`output` to be a folder without results, but got 'cleaned' with cle"):
        main(COMMAND)


def test_a_network_that_lost_too_much_is_rejected(owner, monkeypatch, capsys):
    monkeypatch.setattr(fits, "NBA", lambda network, **kwargs: Ruined(network, **(kwargs | {"lr": 0.5})))
    with pytest.raises(SystemExit) as end, pytest.warns(UserWarning, match="Rejected: the student"):
        main([*COMMAND, "--student_steps=100"])
    assert end.value.code == 3
    assert not Path("cleaned/cleaned.safetensors").exists()
    rejected = load_file("cleaned/rejected.safetensors")
    assert rejected.keys() == load_file("suspicious.safetensors").keys()
    found = report()
    assert found["weights"]["file"] == "rejected.safetensors"
    assert found["weights"]["handed_over"] is False
    assert "The student lost too much clean accuracy. Rejected: the student is right on" in found["weights"]["reason"]
    assert found["weights"]["reason"].endswith("more than the 5.0 points that it may lose.")  # no rate to lower
    assert "max_loss" in found["weights"]["next"]
    assert found["weights"]["next"].endswith("The teacher is kept beside it.")
    assert found["accuracy"]["cleaned"]["value"] < 0.9
    with pytest.raises(SystemExit) as end:
        main([*COMMAND, "--student_steps=100"])
    assert end.value.code == 3
    assert [path.name for path in Path("cleaned").glob("rejected*")] == ["rejected.safetensors"]


def test_a_teacher_that_lost_too_much_gives_way_to_a_smaller_rate(owner, monkeypatch):
    monkeypatch.setattr(teachers, "FineTuning", RuinedTeacher)
    with pytest.warns(UserWarning, match="Rejected: the fitted network"):
        main([*COMMAND, "--teacher_steps=50"])
    found = report()
    assert found["chosen"]["teacher_rate"] == 0.05
    assert not any("fine-tuned" in warning for warning in found["warnings"])  # it is a choice, no warning
    said = found["chosen"]["reasons"]["teacher_rate"]
    assert said.startswith("The strongest of those tried that cost at most 8.8 points of accuracy on held-out ")
    assert said.endswith(
        "A teacher fine-tuned at rate 0.1 was not taken: it lost too much accuracy (0.0 % of the held-out images "
        "right, the suspicious network 100.0). A teacher fine-tuned at rate 0.025 was not taken: nothing shows that "
        "it withstands what a stronger one does (100.0 % of the held-out images right, the suspicious network 100.0)."
    )
    assert found["accuracy"]["teacher"]["value"] == 1.0
    assert Path("cleaned/cleaned.safetensors").is_file()
    assert not Path("cleaned/rejected.safetensors").exists()


@pytest.mark.parametrize(("few", "shares"), [(1000, (0.5, 0.0, False)), (10, (0.0, 1 / 3, True))])
def test_few_images_are_mixed_for_a_teacher_and_features_of_many_are_perturbed(few, shares, owner, monkeypatch):
    asked = []

    class Asked(FineTuning):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            asked.append((self.mixed_share, self.latent_share, self.latent is not None))

    monkeypatch.setattr(teachers, "FineTuning", Asked)
    monkeypatch.setattr(sweep, "FEW_IMAGES", few)
    monkeypatch.setattr(sweep, "MANY_IMAGES", few)
    monkeypatch.setitem(teachers.RATES, "SGD", (0.05,))
    main(COMMAND)
    assert asked == [shares]


def test_without_any_good_teacher_nothing_is_aligned(owner, monkeypatch):
    monkeypatch.setattr(teachers, "FineTuning", RuinedTeacher)
    monkeypatch.setitem(teachers.RATES, "SGD", (0.2, 0.1))
    with pytest.raises(SystemExit) as end, pytest.warns(UserWarning, match="Rejected"):
        main([*COMMAND, "--teacher_steps=50"])
    assert end.value.code == 3
    assert sorted(path.name for path in Path("cleaned").glob("*.safetensors")) == ["rejected.safetensors"]
    assert report()["weights"]["reason"].startswith("The teacher lost too much")
    assert report()["weights"]["reason"].endswith("more than the 8.8 points that it may lose.")
    assert "is kept" not in report()["weights"]["next"]  # what was rejected is the teacher


class Endless(FineTuning):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("inf" if self.lr > 0.1 else 1)


def test_a_rate_at_which_the_loss_becomes_infinite_is_not_taken(owner, monkeypatch, capsys):
    monkeypatch.setattr(teachers, "FineTuning", Endless)
    main([*COMMAND, "--progress=true"])
    said = capsys.readouterr().out
    assert "strongest learning rate that costs 8.8 points of accuracy at most or what chance may, in up to" in said
    assert "  rate 0.025: 100.0 % of the held-out images right, the suspicious network 100.0: affordable\n" in said
    assert "  rate 0.2: the loss became infinite\n5/6  The student: the network, aligned with the teacher of" in said
    assert re.search(r"passes over 72 images; to verify it at most [\d,]+ passes of an image\n", said)
    assert report()["chosen"]["teacher_rate"] == 0.1
    assert "0.2 was not taken: the loss became infinite." in report()["chosen"]["reasons"]["teacher_rate"]


class Run:
    """A cleaning whose students lose too much at high rates, and whose gentle teacher has a given rate."""

    def __init__(self, gentle, held_out=60, suspected=(), training=300):
        self.suspected = list(suspected)
        self.gentle, self.students, self.wholes = gentle, [], []
        self.data = SimpleNamespace(held_out=range(held_out), training=range(training))
        self.warnings = []

    def with_weights(self, file):
        return file

    def teach_gentler(self, steps, teacher):
        found = {"file": "teacher", "chosen": {"rate": self.gentle}, "verdict": "accepted", "left": 0.0}
        return self.gentle and found

    def align(self, teacher, rate, steps, again=False, whole=True):
        assert again == bool(self.students)
        self.students.append(rate)
        self.wholes.append(whole)
        chosen = {"suspected": self.suspected} if self.suspected else {}
        return {"verdict": "rejected" if rate > 0.05 else "accepted", "to_unlearn": self.suspected, "chosen": chosen}

    def unlearn(self, teacher, last):
        return {**last, "unlearned": teacher}

    def judge_fitted(self, last):
        return last


@pytest.mark.parametrize(
    ("run", "students", "verdict"),
    [
        (Run(0.05), [0.1, 0.05], "accepted"),
        (Run(None), [0.1], "rejected"),
        (Run(0.05, held_out=0), [0.1], "rejected"),  # nothing tells teachers apart
    ],
)
def test_a_gentler_teacher_takes_over_where_the_student_lost_too_much(run, students, verdict):
    first = {"file": "teacher", "chosen": {"rate": 0.1}, "verdict": "accepted", "tried": [], "left": 0.0}
    teacher, last = _aligned(run, first, 10, 10)
    assert (run.students, last["verdict"], teacher["chosen"]["rate"]) == (students, verdict, students[-1])
    said = "What came of the teacher at rate 0.1 lost more clean accuracy than `max_loss` allows"
    assert [warning.startswith(said) for warning in run.warnings] == [True] * (len(students) - 1)
    none = run.gentle is None
    assert [one.startswith("Its student lost too much, and there is no") for one in teacher.get("tried", [])] == [
        True
    ] * none


@pytest.mark.parametrize(
    ("run", "students", "wholes"),
    [
        (Run(0.05, training=1000), [0.1, 0.05], [False, True]),
        (Run(None, training=1000), [0.1, 0.1], [False, True]),
        (Run(None, training=1000, suspected=[0]), [0.1], [False]),  # it would find the same again
        (Run(None, training=1000, held_out=0), [0.1], [False]),
        (Run(0.05, training=999), [0.1, 0.05], [True, True]),  # a gentle teacher keeps much of the backdoor
    ],
)
def test_all_of_a_student_is_the_last_resort_where_features_were_perturbed(run, students, wholes):
    _aligned(run, {"file": "teacher", "chosen": {"rate": 0.1}, "verdict": "accepted", "tried": [], "left": 0.0}, 10, 10)
    assert (run.students, run.wholes) == (students, wholes)


@pytest.mark.parametrize(("rate", "suspected", "unlearned"), [(0.05, [0], True), (0.05, [], False), (0.1, [0], False)])
def test_what_is_suspected_is_unlearned_where_the_student_is_good(rate, suspected, unlearned):
    teacher = {"file": "teacher", "chosen": {"rate": rate}, "verdict": "accepted", "tried": [], "left": 0.0}
    _, last = _aligned(Run(None, suspected=suspected), teacher, 10, 10)
    assert last.get("unlearned") == ("teacher" if unlearned else None)


@pytest.mark.parametrize("left", [0.1, 0.22])
def test_what_a_stronger_teacher_shows_to_be_left_is_said(left):
    run, teacher = Run(None), {"file": "teacher", "chosen": {"rate": 0.05}, "verdict": "accepted", "left": left}
    assert _aligned(run, teacher, 10, 10)[0] == teacher
    said = "The teacher (rate 0.05) falls for 22 % of what the suspicious network falls for and a stronger teacher"
    assert [warning.startswith(said) for warning in run.warnings] == [True] * (left > 0.1)


@pytest.mark.parametrize(("rate", "verdict"), [(0.2, "accepted"), (0.1, "accepted"), (0.05, "rejected")])
def test_the_first_teacher_stays_where_none_is_gentler(monkeypatch, capsys, rate, verdict):
    """A stronger one would overwrite the weights of the one that taught the student."""
    other = {"file": "other", "chosen": {"rate": rate}, "verdict": verdict}
    monkeypatch.setattr(steps, "take_teacher", lambda found, chain: pytest.fail("overwritten"))
    run = SimpleNamespace(show=True, max_loss=0.05, _fit_teacher=lambda steps, may_lose: (other, {}))
    assert Cleaning.teach_gentler(run, 10, {"chosen": {"rate": 0.1}}) is None
    assert capsys.readouterr().out.endswith(
        "is there a gentler teacher? It may lose 5.0 points; at most five more fits\n  there is none\n"
    )


def test_a_gentler_teacher_is_asked_for_less_loss_and_says_why_the_first_gave_way(monkeypatch):
    asked = []

    def fit(steps, may_lose):
        asked.append(may_lose)
        found = {"file": "other", "chosen": {"rate": 0.05}, "verdict": "accepted"}
        return found, {0.1: "It lost more accuracy.", 0.2: "The loss became infinite."}

    monkeypatch.setattr(steps, "take_teacher", lambda found, chain: found)
    run = SimpleNamespace(show=False, max_loss=0.05, chain=None, _fit_teacher=fit)
    found = Cleaning.teach_gentler(run, 10, {"chosen": {"rate": 0.1}})
    assert (asked, found["file"]) == ([0.05], "other")
    assert found["tried"][0] == "The loss became infinite."
    assert found["tried"][1].startswith("The one of rate 0.1 was taken first, but its student lost too much accuracy, ")


@pytest.mark.parametrize(("came_back", "whole"), [(0.0, True), (0.12, False)])
def test_what_came_back_for_accuracys_sake_is_said(monkeypatch, tmp_path, came_back, whole):
    class Link(SimpleNamespace):
        def fit(self, module, to):
            assert (module.verification.max_loss, module.verification.whole) == (self.max_loss, whole)
            module.verification.came_back = came_back
            return {"verdict": "accepted"}

        def cost(self):
            return "cheap"

    monkeypatch.setattr(fits, "save_pictures", lambda *given: ["No pictures."])
    data = SimpleNamespace(num_classes=10, training=range(300))
    link = Link(name="student", folder=tmp_path / "fit", data=data, max_loss=0.03)
    chain = SimpleNamespace(folder=tmp_path, step=lambda name, work: work())
    network = SmallCNN(width=4, in_channels=1)
    found = fits.fit_student(network, copy.deepcopy(network), 0.1, whole, link, chain, 0, False)
    said = "To lose no more clean accuracy than `max_loss`, 12 % of what tells the backdoor came back"
    assert [warning.startswith(said) for warning in found["warnings"]] == [False, *([True] if came_back else [])]


class CtrlC(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise KeyboardInterrupt


class Interrupted(NBA):
    def configure_callbacks(self):
        return [*super().configure_callbacks(), CtrlC()]


def test_ctrl_c_keeps_what_is_done(owner, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(fits, "NBA", Interrupted)
        with pytest.raises(SystemExit) as end:
            main(COMMAND)
    assert end.value.code == 130
    assert [path.name for path in Path("cleaned/fits").glob("teacher*/*.ckpt")] == []  # several networks on the disk
    said = capsys.readouterr().err
    assert "Interrupted. Kept are state.json, teacher.safetensors in cleaned; the same command goes on" in said
    teacher = Path("cleaned/teacher.safetensors").stat().st_mtime_ns
    main(COMMAND)
    assert Path("cleaned/cleaned.safetensors").is_file()
    assert Path("cleaned/teacher.safetensors").stat().st_mtime_ns == teacher


def test_another_order_of_classes_is_found(owner):
    with pytest.raises(SystemExit) as end:
        main([*COMMAND, "--classes", "[red,blue,green]"])
    said = str(end.value)
    assert "right on at least half of its clean images, but it is on 0 of 90" in said
    assert "30 of 30 images of 'red' as class 2 ('green')" in said
    assert "With `--classes [blue,green,red]` it would be right on 90: is that its order?" in said
    main([*COMMAND, "--classes", "[blue,green,red]"])


def test_further_classes_of_the_network_are_said(owner):
    state = load_file("suspicious.safetensors")
    more = {
        "fc.weight": F.pad(state["fc.weight"], (0, 0, 0, 2)),
        "fc.bias": F.pad(state["fc.bias"], (0, 2), value=-9.0),
    }
    save_file({**state, **more}, "five.safetensors")
    five = [*COMMAND, "--network.num_classes=5", "--weights=five.safetensors"]
    with pytest.raises(
        SystemExit, match="`classes` to be the names of the network's 5 classes in its order, but got 3 f"
    ):
        main(five)
    with pytest.warns(UserWarning, match="1 of 4 classes have no clean image: black"):
        main([*five, "--classes=[blue,green,red,black]"])
    assert report()["classes"] == ["blue", "green", "red", "black", "class 4"]
    assert "The network has 1 more classes than have names, taken to come last" in report()["warnings"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network=mine.Nothing"], r"`network` to be the import path of a class or function, .* 'mine.Nothing' \("),
        (
            ["--network=mine.number"],
            r"`network` to be a class or function that gives an nn.Module, but got int of mine",
        ),
        (["--network.depth=3"], r"callable with the arguments `--network.NAME VALUE`, but got mine.Colours\(num_cl"),
        (["--mean=null"], r"`mean` to be given with `std`: the normalisation"),
        (["--channels=1"], r"`image_size` to be the height and width that Colours takes \(and `channels` 1 or 3\)"),
        (["--output=mine.py"], r"`output` to be a folder, but got 'mine.py': .* is a file"),
        (["--images=nothing"], r"`images` to be a folder with images as <class>/\*, but got 'nothing', which does"),
        (["--max_loss=2"], r"`max_loss` to be in \[0, 1\]"),
        (["--weights=none.pth"], r"`weights` to be an existing file"),
        (["--max-lost=2"], r"an option of this command, but got '--max_lost'. Did you mean `?--max_loss"),
    ],
)
def test_bad_input_is_one_sentence(owner, arguments, message):
    with pytest.raises(SystemExit, match=message) as end:
        main([*COMMAND, *arguments])
    assert len(str(end.value).splitlines()) <= 2
    assert not Path("cleaned/report.json").exists()


def test_a_full_disk_is_one_sentence(owner, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    with monkeypatch.context() as patch:
        patch.setattr("nba_lightning.app.chain.shutil.disk_usage", lambda path: usage)
        with pytest.raises(SystemExit, match=r"`output` to be on a disk with about 16 MiB free, but got 'cleaned'"):
            main(COMMAND)

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("nba_lightning.callbacks.cleaned_weights.save_weights", full)
    with pytest.raises(SystemExit, match="No space left on the disk .* What was written before is kept"):
        main(COMMAND)


def test_in_python_a_network_in_and_a_report_out(owner):
    import mine

    network = mine.good()
    with torch.no_grad():
        network.fc.weight.copy_(network.fc.weight[[2, 1, 0]])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = nba_lightning.clean(
        network, "images", "out", teacher_steps=5, student_steps=5, scan=False, device="cpu", progress=False
    )
    assert found == report("out")
    assert found["accuracy"]["suspicious"]["value"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_in_python_what_would_be_ignored_is_refused(owner):
    import mine

    with pytest.raises(ValueError, match=r"`mean` to be given with `std`, or neither, but got \[0.5\] and None"):
        nba_lightning.clean(mine.good(), "images", "out", mean=[0.5])
    ready = nba_lightning.CleanImages("images")
    with pytest.raises(ValueError, match="Expected `classes` and `image_size` to be given to CleanImages itself"):
        nba_lightning.clean(mine.good(), ready, "out", classes=["red", "blue", "green"], image_size=4)
    assert not Path("out").exists()


def test_other_images_drawn_of_the_same_folder_are_another_run(owner):
    main([*COMMAND, "--max-images=60", "--held-out=0.2"])
    with pytest.raises(SystemExit, match="other arguments: .*`images_used` was 60, is 75"):
        main([*COMMAND, "--max-images=75", "--held-out=0.16"])


def test_progress_false_prints_warnings_and_results_only(owner, capsys):
    main([*COMMAND, "--max-images=60"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(line.startswith("Note: ") for line in printed.err.splitlines())


def test_the_end_says_how_sure_an_accuracy_is(owner, capsys):
    """18 right answers of 18 have a standard error of 0 and prove little."""
    main([*COMMAND, "--progress=true"])
    assert "cleaned: 100.0 % (95 %: 82.4 to 100.0) of 18 held-out images" in capsys.readouterr().out
