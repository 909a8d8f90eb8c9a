"""The README's commands run as they stand there, in a folder of an owner's, on few and small images."""

import re
import shlex
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import resnet18

import nba_lightning
from nba_lightning.app import steps
from nba_lightning.app.cli import main
from nba_lightning.networks import SmallCNN
from nba_lightning.training.search import Search
from tests.app.conftest import write_images
from tests.test_readme import README

OURS = re.compile(r"\bnba[-_]lightning (?!demo)")
BLOCKS = [
    [line.strip() for line in block.replace("\\\n", " ").splitlines() if OURS.search(line)]
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
]
RUN = [commands for commands in BLOCKS if commands and "..." not in commands[0]]
SKETCHED = [command for commands in BLOCKS for command in commands if "..." in command]
SHORT = {
    "fit": "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.accelerator cpu --trainer.logger false "
    "--trainer.enable_progress_bar false --trainer.default_root_dir .",
    "test": "--trainer.limit_test_batches 1 --trainer.accelerator cpu --trainer.logger false "
    "--trainer.enable_progress_bar false",
    "clean": "--teacher-steps 1 --student-steps 1 --device cpu --progress false --trust-classes true",
    "scan": "--device cpu --progress false --trust-classes true",
}
VERIFIED = ["--model.verification.search=Search"]
VERIFIED += [f"--model.verification.search.{option}" for option in ("steps=1", "images_each=1", "sizes=[0.018]")]
OF_PARTS = {
    "attack/lc": ["--data.attack.steps=1"],
    "implant/input_aware": ["--trainer.max_epochs=3"],  # of which its mask takes two
    "nba": VERIFIED,
    "defense/nba": VERIFIED,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the commands take for granted: suspicious weights and clean images. What is slow is short."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=3).state_dict(), "suspicious.pth")
    write_images(tmp_path / "clean", 8, size=16)
    monkeypatch.setattr(steps, "run_scans", lambda *args: {"classes": {}, "verdict": {}, "warnings": []})
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """A verification that takes no time, where no parser looks at its arguments."""
    short = partialmethod(Search.__init__, sizes=(0.018,), steps=1, images_each=1)
    monkeypatch.setattr(Search, "__init__", short)


def test_the_commands_are_all_found():
    words = [re.search(r"nba[-_]lightning (\w+)", command)[1] for commands in BLOCKS for command in commands]
    assert {"clean", "scan", "fit", "test"} == set(words)
    assert len(words) == README.count("\nnba-lightning ") + len(re.findall(r"\n(torchrun|srun) ", README))


@pytest.mark.parametrize("commands", RUN, ids=[shlex.split(commands[0])[1] for commands in RUN])
def test_commands_run_as_they_stand(commands, folder, request):
    if commands[0].startswith("nba-lightning clean"):
        request.getfixturevalue("quick")
    for command in commands:
        _, subcommand, *arguments = shlex.split(command, comments=True)
        short = [option for part, options in OF_PARTS.items() if part in arguments for option in options]
        main([subcommand, *arguments, *SHORT[subcommand].split(), *short])
        places = [where for flag, where in pairwise(arguments) if flag in ("--checkpoint.dirpath", "--output")]
        assert all(list(Path(where).iterdir()) for where in places), command
    if shlex.split(commands[0])[1] == "clean":
        page = Path("cleaned/report.html")
        page.unlink()
        main(["report", "cleaned/"])
        assert page.is_file()


@pytest.mark.parametrize("command", SKETCHED, ids=["machine", "torchrun", "cluster", "shards"])
def test_commands_of_several_processes_parse(command, folder, monkeypatch, capsys):
    monkeypatch.setenv("SCRATCH", str(folder))
    parts = "--config nba --config digits --config small_cnn_digits"
    arguments = command.replace("...", parts).replace("$SCRATCH", str(folder))
    _, _, rest = re.split(r"(nba[-_]lightning) ", arguments, maxsplit=1)
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(rest, comments=True), "--print_config"])
    assert end.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    strategy = "lightning.pytorch.strategies.ModelParallelStrategy" if "fsdp2" in command else "ddp"
    assert (found["class_path"] if isinstance(found, dict) else found) == strategy


def test_an_owner_s_lines_of_python_run(folder, quick, monkeypatch):
    lines = re.search(r"```python\n(import nba_lightning\n\nreport = .*?)```", README, flags=re.DOTALL)[1]
    short = {"teacher_steps": 1, "student_steps": 1, "device": "cpu", "progress": False, "trust_classes": True}
    monkeypatch.setattr(nba_lightning, "clean", partial(nba_lightning.clean, **short))
    exec(lines, {"network": SmallCNN(num_classes=3, width=2)})
    assert Path("cleaned/report.html").is_file()
