"""``clean`` under torchrun, from a folder that is not the repository's. CPU, gloo."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.app.test_clean import COMMAND


@pytest.mark.xdist_group("processes")
def test_the_whole_chain_runs_on_two_processes(owner):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "nba_lightning", *COMMAND, "--progress=true"]
    ran = subprocess.run(command, cwd=owner, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    assert ran.stdout.count("1/6  The images") == 1  # the first process speaks for both
    found = json.loads((owner / "cleaned" / "report.json").read_text())
    assert found["chosen"]["batch"] == 18  # of both together, as many as one process takes
    assert {name: entry["images"] for name, entry in found["accuracy"].items()} == dict.fromkeys(found["accuracy"], 18)
    came, cleaned = (load_file(owner / name) for name in ("suspicious.safetensors", "cleaned/cleaned.safetensors"))
    assert came.keys() == cleaned.keys()
    assert sorted(path.name for path in (owner / "cleaned").glob("*.safetensors")) == [
        "cleaned.safetensors",
        "teacher.safetensors",
    ]
