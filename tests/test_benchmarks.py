"""The grid from end to end on tiny data: cells, resuming, failures, the report."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml

from nba_lightning import BackdoorDataModule, Defense
from nba_lightning.data import Digits
from nba_lightning.data.dataset import MemoryImages
from tests import benchmark_calls
from tests.benchmark_calls import BENCHMARKS

KEYS = {
    *("attack", "defense", "seed", "acc", "asr", "ra", "der", "seconds", "passes_per_image", "peak_memory_mib"),
    *("network", "source", "clean_fraction", "poison_rate", "settings", "versions", "hardware"),
}
NETWORK = {"class_path": "nba_lightning.networks.SmallCNN", "init_args": {"width": 4}}
SHORT = ("--label", "brief", "--set", "epochs=1")
# One batch of 50 of the 60 images an epoch, forwards and backwards, ten epochs; a look at the first batch, and a check.
FINE_TUNING = (2 * 10 * 50 + 50 + 2) / 60


def options(script, folder, *arguments):
    here = {"--work": folder / "work", "--results": folder / "d", "--attack-results": folder / "a"}
    if script == "report":
        here.pop("--work")
    else:
        arguments = ("--data", "digits", "--network", "small_cnn_digits", "--epochs", "1", *arguments)
    return [*(part for pair in here.items() for part in pair), *arguments]


def call(script, folder, *arguments):
    return benchmark_calls.call(script, *options(script, folder, *arguments))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    arguments = ("--attacks", "badnets", "clean", "--defenses", "fine_tuning", "--seeds", "0", "1")
    ran = call("grid", folder, *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, arguments


def test_every_cell_says_what_it_is(grid):
    folder, _ = grid
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "d").glob("*.json")}
    assert sorted(found) == [f"{attack}-fine_tuning-{seed}" for attack in ("badnets", "clean") for seed in (0, 1)]
    assert found["badnets-fine_tuning-0"].keys() >= KEYS
    assert not {"asr", "ra", "der"} & found["clean-fine_tuning-0"].keys()
    assert found["badnets-fine_tuning-0"]["passes_per_image"] == pytest.approx(FINE_TUNING, abs=0.01)
    assert found["badnets-fine_tuning-0"]["acc"] != found["badnets-fine_tuning-1"]["acc"]
    before = json.loads((folder / "a" / "badnets-none-0.json").read_text())
    assert before["defense"] == "none"
    assert before["never_poisoned"]["asr"] < before["asr"]


def test_what_is_there_is_not_run_again_and_failures_are_tried_again(grid):
    folder, arguments = grid
    path = folder / "d" / "badnets-fine_tuning-0.json"
    times = {kept.name: kept.stat().st_mtime_ns for kept in (folder / "d").glob("*.json")}
    failed = {"attack": "badnets", "defense": "fine_tuning", "seed": 0, "error": "ValueError: a reason"}
    path.write_text(json.dumps(failed))
    report = call("report", folder)
    assert "1 failed: ValueError: a reason" in report.stdout
    ran = call("grid", folder, *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    changed = {kept.name for kept in (folder / "d").glob("*.json") if kept.stat().st_mtime_ns != times[kept.name]}
    assert changed == {path.name}
    assert "acc" in json.loads(path.read_text())


def test_a_model_that_is_gone_is_trained_again(grid):
    folder, arguments = grid
    row, weights = folder / "a" / "badnets-none-0.json", folder / "work" / "badnets.safetensors"
    before, content = json.loads(row.read_text()), weights.read_bytes()
    weights.unlink()
    ran = call("grid", folder, *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert weights.read_bytes() == content
    assert json.loads(row.read_text())["asr"] == before["asr"]


def test_a_cell_that_fails_is_recorded_and_stops_no_other(grid):
    folder, _ = grid
    cells = ("--attacks", "badnets", "--seeds", "2", "--defenses", "fine_tuning", "--ablations", "teacher_ft_sam")
    ran = call("grid", folder, *cells, "--jobs", "2")
    assert ran.returncode != 0
    assert "1 cells failed" in ran.stderr
    assert "FileNotFoundError" in json.loads((folder / "d" / "badnets-teacher_ft_sam-2.json").read_text())["error"]
    assert "acc" in json.loads((folder / "d" / "badnets-fine_tuning-2.json").read_text())


def test_ablations_run_and_a_teacher_is_found_among_the_models(grid, monkeypatch):
    import keeping

    monkeypatch.setattr(keeping, "LEAST_STEPS", 10)
    folder, _ = grid
    ablations = ("regenerate_never", "teacher_never_poisoned")
    ran = call("grid", folder, "--attacks", "badnets", "--seeds", "0", "--defenses", "--ablations", *ablations)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "acc" in json.loads((folder / "d" / "badnets-regenerate_never-0.json").read_text())
    given = (folder / "d" / "badnets-teacher_never_poisoned-0.json").read_text()
    assert "acc" in json.loads(given)
    assert str(folder) not in given  # settings, not where somebody keeps models


def test_a_teacher_is_fitted_once_and_counts_into_the_cost_of_each_that_asks_for_it(grid):
    folder, _ = grid
    ran = call("grid", folder, "--attacks", "badnets", "--defenses", "nad", "--seeds", "0", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    cells = [json.loads((folder / "d" / f"badnets-nad-{seed}.json").read_text()) for seed in (0, 1)]
    student = (3 * 10 * 60 + 60 + 2) / 60  # forwards, backwards and through the teacher, in one batch
    for cell in cells:
        assert cell["passes_per_image"] == pytest.approx(FINE_TUNING + student, abs=0.01)
        assert cell["settings"]["teacher"]["class_path"].endswith("FineTuning")
        assert cell["settings"]["teacher"]["epochs"] == 10
    fits = {path: path.stat().st_mtime_ns for path in (folder / "work" / "fits").iterdir()}
    ran = call("grid", folder, "--attacks", "badnets", "--defenses", "nad", "--seeds", "0", *SHORT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    again = json.loads((folder / "d" / "badnets-brief-0.json").read_text())
    assert again["passes_per_image"] == pytest.approx(FINE_TUNING + (3 * 60 + 60 + 2) / 60, abs=0.01)
    found = {path: path.stat().st_mtime_ns for path in (folder / "work" / "fits").iterdir()}
    assert found.items() >= fits.items()
    assert len(found) == len(fits) + 2  # weights and cost of the student alone: the teacher was there


def test_attacks_that_train_something_of_their_own_get_images_that_nobody_triggered(grid, monkeypatch):
    folder, _ = grid
    every = Digits.load

    def some(self):
        return tuple(MemoryImages(part.images[::3], part.labels[::3]) for part in every(self))

    monkeypatch.setattr(Digits, "load", some)
    where = ("--work", folder / "work", "--results", folder / "a", "--data", "digits", "--network", "small_cnn_digits")
    ran = benchmark_calls.call("attacks", *where, "--epochs", "1", "--attacks", "input_aware", "ssba")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in ("input_aware", "ssba"):
        assert json.loads((folder / "a" / f"{name}-none-0.json").read_text())["psnr"] > 5
        assert (folder / "work" / f"{name}.attack.safetensors").exists()


def test_what_is_built_of_a_configuration_leaves_it_as_it_is():
    from common import build, config, merged

    found = merged(
        config("defense", "nba"), yaml.safe_load((BENCHMARKS / "ablations" / "without_patch.yaml").read_text())
    )
    before = json.dumps(found)
    build(Defense, merged(found["model"], {"init_args": {"model": NETWORK}}))
    assert json.dumps(found) == before


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ablation_names_arguments_of_the_method(path):
    from common import build, config, merged

    spec = merged(config("defense", "nba"), yaml.safe_load(path.read_text()))["model"]
    spec["init_args"].pop("teacher_weights", None)
    assert isinstance(build(Defense, merged(spec, {"init_args": {"model": NETWORK}})), Defense)


def test_a_source_that_is_read_once_keeps_its_classes():
    from common import Loaded

    assert Loaded(Digits()).classes == Digits().classes
    assert BackdoorDataModule(Loaded(Digits()), batch_size=16).source.classes == Digits().classes


def test_the_report_has_averages_rows_and_a_figure(grid, tmp_path):
    folder, _ = grid
    report = call("report", folder, "--figure", str(tmp_path / "grid.png"))
    assert report.returncode == 0, report.stderr
    assert "Means over 1 attacks (badnets)" in report.stdout
    assert "| clean | fine_tuning | 2 |" in report.stdout
    assert "| badnets | *never poisoned* | 1 |" in report.stdout
    assert "regenerate_never" not in report.stdout  # an ablation, shown when it is named
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_the_compact_report_marks_the_best_of_each_figure(grid, tmp_path):
    folder, _ = grid
    figures = {"fine_tuning": (0.7, 0.1, 0.6), "nba": (0.8, 0.1, 0.7)}
    for defense, (acc, asr, ra) in figures.items():
        cell = {"attack": "badnets", "defense": defense, "seed": 0, "acc": acc, "asr": asr, "ra": ra}
        (tmp_path / f"{defense}.json").write_text(json.dumps(cell))
    report = call("report", folder, "--compact", "--results", str(tmp_path))
    assert report.returncode == 0, report.stderr
    assert "| fine_tuning | 70.0<br>**10.0**<br>60.0 |" in report.stdout
    assert "| nba | **80.0**<br>**10.0**<br>**70.0** |" in report.stdout
    assert "*never poisoned*" in report.stdout


def test_a_defence_that_missed_an_attack_is_named_and_does_not_narrow_the_averages(grid, tmp_path):
    folder, _ = grid
    before = json.loads((folder / "a" / "badnets-none-0.json").read_text())
    for attack in ("badnets", "sig"):
        (tmp_path / f"{attack}-none-0.json").write_text(json.dumps(before | {"attack": attack}))
    cells = [(a, d) for a in ("badnets", "sig") for d in ("nad", "nba", "sau") if (a, d) != ("sig", "sau")]
    for attack, defense in cells:
        cell = {"attack": attack, "defense": defense, "seed": 0, "acc": 0.8, "asr": 0.1, "ra": 0.7, "der": 0.9}
        (tmp_path / f"d-{attack}-{defense}.json").write_text(json.dumps(cell | {"seconds": 1.0}))
    results = tmp_path / "d"
    results.mkdir()
    for path in tmp_path.glob("d-*.json"):
        path.rename(results / path.name)
    report = call("report", folder, "--results", str(results), "--attack-results", str(tmp_path))
    assert "Means over 2 attacks (badnets, sig)" in report.stdout
    assert "Not averaged, since attacks are missing: sau (1 of 2)." in report.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--defenses", "nba", "--set", "alignment=0"),
        ("--defenses", "nba", "nad", "--label", "changed"),
        ("--label", "changed"),
        ("--defenses", "nba", "--ablations", "no_mixing", "--label", "changed", "--set", "alignment=0"),
    ],
)
def test_changed_settings_need_one_defence_and_a_name_of_their_own(arguments, tmp_path):
    ran = call("grid", tmp_path, *arguments)
    assert ran.returncode == 2
    assert "--label" in ran.stderr


def test_a_cell_of_other_settings_is_not_taken_for_today_s(grid):
    folder, _ = grid
    arguments = ("--attacks", "badnets", "--defenses", "fine_tuning", "--seeds", "0", "--label", "short", "--set")
    assert call("grid", folder, *arguments, "epochs=1").returncode == 0
    assert call("grid", folder, *arguments, "epochs=1").returncode == 0
    ran = call("grid", folder, *arguments, "epochs=2")
    assert ran.returncode != 0
    assert "delete or rename them: badnets-short-0" in ran.stderr
    assert "short" not in call("report", folder).stdout  # shown when it is named
    assert "| badnets | short | 1 |" in call("report", folder, "--only", "short").stdout


def killed(folder, *arguments):
    """Start the grid, and kill it when a fit was saved; the saved fit."""
    command = [sys.executable, BENCHMARKS / "grid.py", *options("grid", folder, *arguments)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while not (saved := list((folder / "work").glob("unfinished/*/fit.ckpt"))):
            assert running.poll() is None, running.stdout.read().decode()
            time.sleep(0.001)
    finally:
        running.kill()
        running.wait()
    return saved[0]


def test_a_cell_that_was_killed_goes_on_to_the_same_figures(grid, tmp_path):
    folder, _ = grid
    shutil.copytree(folder / "work", tmp_path / "work")
    shutil.copytree(folder / "a", tmp_path / "a")
    cell = ("--attacks", "badnets", "--defenses", "nad", "--seeds", "0", "--label", "short", "--set", "epochs=60")
    path = tmp_path / "d" / "badnets-short-0.json"
    saved = killed(tmp_path, *cell, "--save-every", "0")
    assert not path.exists()
    checkpoint = torch.load(saved, weights_only=True)
    checkpoint["callbacks"]["Meter"]["passes"] += 60 * 1000  # so that the figures tell a resumed fit from a new one
    torch.save(checkpoint, saved)
    ran = call("grid", tmp_path, *cell)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    resumed = json.loads(path.read_text())
    assert not list((tmp_path / "work" / "unfinished").iterdir())
    path.unlink()
    shutil.rmtree(tmp_path / "work" / "fits")
    assert call("grid", tmp_path, *cell).returncode == 0
    whole = json.loads(path.read_text())
    assert resumed["passes_per_image"] == pytest.approx(whole["passes_per_image"] + 1000)
    assert all(resumed[name] == whole[name] for name in ("acc", "asr", "ra", "der"))
