"""The population script from end to end on digits, and its report on made-up results with known answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scan.py"
METHODS = ("maximum_margin", "class_shift", "teacher_disagreement")
TINY = ("--data", "digits", "--clean", "1", "--each", "1", "--attacks", "badnets", "trojannn", "--epochs", "5")


def call(folder, *arguments):
    where = ("--results", str(folder / "results"), "--work", str(folder / "work"))
    return subprocess.run(
        [sys.executable, str(SCRIPT), *where, *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    folder = tmp_path_factory.mktemp("population")
    ran = call(folder, *TINY, "--teacher-epochs", "1", "--starts", "2", "--steps", "5", "--owner", "0.1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def rows_of(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


def test_every_network_says_what_it_is(population):
    rows = rows_of(population)
    assert sorted(rows) == ["digits-badnets-1000", "digits-clean-0", "digits-trojannn-1000"]
    for row in rows.values():
        assert list(row["scans"]) == list(METHODS)
        assert all(len(scan["classes"]) == 10 and scan["passes"] > 0 for scan in row["scans"].values())
        assert {"acc", "seconds", "teacher", "settings", "versions", "hardware"} <= row.keys()
        assert str(population) not in json.dumps(row)
    assert "asr" not in rows["digits-clean-0"]
    assert rows["digits-badnets-1000"]["asr"] > 0.5
    assert rows["digits-badnets-1000"]["target"] == 0
    assert rows["digits-trojannn-1000"]["target"] == 8


def test_what_is_there_is_not_made_again_and_a_lost_result_is_scanned_again(population):
    path = population / "results" / "digits-badnets-1000.json"
    before, times = json.loads(path.read_text()), {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir()}
    (weights,) = (population / "work").glob("digits-badnets-1000-*.network.safetensors")
    trained = weights.stat().st_mtime_ns
    path.unlink()
    ran = call(population, *TINY, "--teacher-epochs", "1", "--starts", "2", "--steps", "5", "--owner", "0.1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    after = json.loads(path.read_text())
    changed = [p.name for p in path.parent.iterdir() if p.stat().st_mtime_ns != times[p.name]]
    assert changed == [path.name]
    assert weights.stat().st_mtime_ns == trained
    assert (after["acc"], after["asr"]) == (before["acc"], before["asr"])  # the very trigger, too
    for method in METHODS:
        assert after["scans"][method]["classes"] == before["scans"][method]["classes"]


def test_the_report_reads_what_was_measured(population, tmp_path):
    ran = call(population, "--report", "--figure", str(tmp_path / "roc.png"))
    assert ran.returncode == 0, ran.stderr
    assert "| digits | badnets | 1 |" in ran.stdout
    assert "| digits | class_shift | studentised |" in ran.stdout


def test_results_of_other_settings_are_not_taken_for_today_s(population):
    ran = call(population, *TINY, "--teacher-epochs", "2", "--starts", "2", "--steps", "5", "--owner", "0.1")
    assert ran.returncode == 1
    assert "delete or rename them: digits-clean-0, digits-badnets-1000, digits-trojannn-1000" in ran.stderr


def made_up(folder, attack, seed, statistics, asr=None, target=None):
    classes = [{"class": k, "statistic": s, "p_value": 0.5} for k, s in enumerate(statistics)]
    scan = {
        "method": "m",
        "classes": classes,
        "rule": "r",
        "seconds": 2.0,
        "passes": 100,
        "settings": {},
        "details": {},
    }
    row = {"data": "d", "attack": attack, "seed": seed, "target": target, "acc": 0.9, "teacher": {"acc": 0.8}}
    row |= {"scans": {"m": scan}} | ({} if asr is None else {"asr": asr})
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{attack}-{seed}.json").write_text(json.dumps(row))


def test_the_report_s_figures_are_those_of_planted_results(tmp_path):
    """Class 4 is an outlier in every network: the first rule always alarms, the second knows it from the references."""
    generator = torch.Generator().manual_seed(0)

    def statistics(planted=None):
        values = (0.1 * torch.randn(10, generator=generator)).exp()
        values[4] *= 5
        if planted is not None:
            values[planted] *= 50
        return values.tolist()

    for seed in range(60):
        made_up(tmp_path, "clean", seed, statistics())
    for seed in range(8):
        made_up(tmp_path, "badnets", seed, statistics(2), asr=0.9, target=2 if seed else 3)
    made_up(tmp_path, "wanet", 0, statistics(), asr=0.4, target=2)
    (tmp_path / "results" / "z.json").write_text(json.dumps({"attack": "sig", "seed": 5, "error": "ValueError: why"}))
    ran = call(tmp_path, "--report", "--figure", str(tmp_path / "roc.png"))
    assert ran.returncode == 0, ran.stderr
    table = {row.split(" | ")[2]: row for row in ran.stdout.splitlines() if row.startswith("| d | m |")}
    assert "| 100 (63 to 100) of 8 |" in table["conformal"]
    # One target was written down wrongly; one clean network shares the smallest p-value: 1 - 1 / 30 / 2.
    assert "| 88 (47 to 100) of 8 | 0.98 |" in table["conformal"]
    assert "| 30 | " in table["conformal"]
    assert "| 100 (88 to 100) of 30 |" in table["studentised"]
    false_alarms = float(table["conformal"].split(" | ")[5].split(" ")[0])
    assert false_alarms <= 17
    assert "| d | wanet | 1 | 90 (90 to 90) | 40 (40 to 40) | 80 (80 to 80) |  | 1 |" in ran.stdout
    assert "1 failed: sig 5: ValueError: why" in ran.stdout
    assert "| d | m | 2.0 | 100 |" in ran.stdout
    assert (tmp_path / "roc.png").stat().st_size > 10_000


def test_folders_need_a_root(tmp_path):
    ran = call(tmp_path, "--data", "cifar10")
    assert ran.returncode == 2
    assert "--root is needed" in ran.stderr


def test_images_of_a_folder_are_resized_to_what_is_asked(tmp_path):
    for part in ("train", "test"):
        for name in ("bird", "cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(50):
                color = (5 * number, 100, {"bird": 0, "cat": 100, "dog": 200}[name])
                Image.new("RGB", (12, 12), color).save(tmp_path / "images" / part / name / f"{number}.png")
    tiny = ("--clean", "1", "--each", "0", "--epochs", "1", "--teacher-epochs", "1", "--starts", "1", "--steps", "1")
    folder = ("--data", "folder", "--root", str(tmp_path / "images"), "--image-size", "8", "--owner", "0.5")
    ran = call(tmp_path, *folder, *tiny, "--images", "150", "--test-images", "12")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert rows_of(tmp_path)["folder-clean-0"]["image_shape"] == [3, 8, 8]
