"""Reading from disk is timed beside ImageFolder, over the same pictures."""

import importlib
import json
import sys

from tests import benchmark_calls  # noqa: F401  (puts the benchmarks on the path)

FEW = {"images": 240, "side": 16, "batch": 8, "padding": 2, "workers": 0, "rounds": 2, "epochs": 3}


def test_both_read_the_pictures_and_what_was_measured_is_written(monkeypatch, tmp_path):
    disk = importlib.import_module("disk")
    read = []
    monkeypatch.setattr(disk.Reading, "training_step", lambda self, batch, index: read.append(len(next(iter(batch)))))
    result = tmp_path / "disk.json"
    few = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["disk.py", *few, "--work", str(tmp_path), "--result", str(result)])
    disk.main()
    found = json.loads(result.read_text())
    assert found["image_folder_over_ours"]["n"] == 2
    assert found["image_folder_over_ours"]["mean"] > 0
    for reader in ("ours", "image_folder"):
        assert len(found["memory"][reader]["mib"]) == 3
    assert len(list((tmp_path / "pictures").rglob("train/*/*.jpg"))) == 240
    assert sum(read) == 2 * 7 * 240  # three epochs that are watched and four that are timed, of each reader
