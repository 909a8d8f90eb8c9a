"""An owner's folder in the shipped configs: a Lightning project without an attack."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nba_lightning.app.cli import main
from nba_lightning.app.configs import fitted_to_data, shipped_folder
from nba_lightning.data import BackdoorDataModule

DATA = ["--config=clean_images", "--data.root=images"]
NETWORK = [
    "--model.model=nba_lightning.Normalized",
    "--model.model.network=mine.Colours",
    "--model.model.mean=[0.5,0.5,0.5]",
    "--model.model.std=[0.25,0.25,0.25]",
    "--model.weights=suspicious.safetensors",
]
QUICK = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
NAMES = sorted(path.stem for path in (shipped_folder() / "defense").glob("*.yaml"))


def test_a_teacher_and_a_student_are_fitted_to_a_folder_of_clean_images(owner):
    quick = [*QUICK, "--trainer.max_epochs=1"]
    teacher = "--model.teacher_weights=teacher/cleaned.safetensors"
    main(["fit", "--config=teacher", *DATA, *NETWORK, *quick, "--checkpoint.dirpath=teacher"])
    main(["fit", *DATA, "--config=nba", *NETWORK, *quick, "--checkpoint.dirpath=nba", teacher])
    came, cleaned = load_file("suspicious.safetensors"), load_file("nba/cleaned.safetensors")
    assert came.keys() == cleaned.keys()
    assert not torch.equal(came["fc.weight"], cleaned["fc.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_defense_goes_with_a_folder_of_clean_images(name, owner, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config=defense/{name}", *DATA, *NETWORK[:-1], "--print_config"])
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)["data"]
    assert shown["class_path"].endswith("CleanImages")
    assert shown["init_args"]["batch_size"] is None  # what fits the folder, not what a defence takes of a benchmark


def test_somebody_elses_data_module_goes_with_a_shipped_defense_too(owner, capsys):
    Path("theirs.py").write_text(
        "import lightning.pytorch as pl\n"
        "from nba_lightning import BackdoorDataModule\n"
        "class Theirs(pl.LightningDataModule):\n    def __init__(self, root: str = '.'):\n        super().__init__()\n"
        "class Research(BackdoorDataModule):\n    pass\n"
    )
    found = {}
    for name in ("Theirs", "Research"):
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config=nba", f"--data=theirs.{name}", *NETWORK[:-1], "--print_config"])
        assert end.value.code == 0
        found[name] = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert found["Theirs"] == {"root": "."}
    assert found["Research"]["train_on"] == "clean"
    sys.modules.pop("theirs", None)


def test_only_what_shipped_defenses_ask_of_the_research_data_is_left_out(tmp_path):
    shipped = str(shipped_folder() / "defense" / "nba.yaml")
    (tmp_path / "mine.yaml").write_text("data: {init_args: {batch_sise: 3}}\n")
    given = [shipped, str(tmp_path / "mine.yaml")]
    for data in (["BackdoorDataModule"], [f"{BackdoorDataModule.__module__}.BackdoorDataModule"], [], ["no.Such"]):
        assert fitted_to_data(given, data) == given
    changed, kept = fitted_to_data(given, ["CleanImages"])
    assert yaml.safe_load(changed).keys() == yaml.safe_load(Path(shipped).read_text()).keys() - {"data"}
    assert kept == given[1]  # its typo is not ours to hide


def test_an_argument_that_clean_images_does_not_have_is_still_refused(owner):
    with pytest.raises(SystemExit, match="Expected an argument of CleanImages, but got 'train_on'"):
        main(["fit", "--config=nba", *DATA, *NETWORK, "--data.train_on=clean"])
