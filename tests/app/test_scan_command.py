"""``nba-lightning scan``, and networks of all kinds by their names."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nba_lightning.app.cli import main
from nba_lightning.app.networks import count_classes, load_network
from nba_lightning.app.owner import prepare

NETWORK = [
    "--network=mine.Colours",
    "--mean=[0.5,0.5,0.5]",
    "--std=[0.25,0.25,0.25]",
    "--weights=suspicious.safetensors",
]
COMMAND = ["scan", *NETWORK, "--device=cpu", "--progress=false"]
GIVEN = {"mean": [0.5], "std": [0.25]}


def test_it_writes_what_each_scan_found_and_says_it(owner, capsys):
    main([*COMMAND, "--images=images"])
    found = json.loads(Path("scanned/scan.json").read_text())
    assert found["names"] == ["blue", "green", "red"]
    assert set(found["classes"]) == {"maximum_margin", "class_shift"}
    said = capsys.readouterr().out
    for method, sentence in found["verdict"].items():
        assert f"{method}: {sentence}" in said
    assert "A scan that finds nothing proves nothing" in said
    with pytest.raises(SystemExit, match="`output` to be a folder without .*results, but got 'scanned'"):
        main([*COMMAND, "--images=images"])


def test_without_images_it_does_what_needs_none(owner):
    with pytest.raises(SystemExit, match="`image_size` to be given where there are no `images`"):
        main(COMMAND)
    main([*COMMAND, "--image-size=8", "--classes=[a,b,c]"])
    assert set(json.loads(Path("scanned/scan.json").read_text())["classes"]) == {"maximum_margin"}


def test_a_wrong_order_of_classes_is_refused(owner):
    with pytest.raises(SystemExit, match=r"With `--classes \[blue,green,red\]` it would be right on 90"):
        main([*COMMAND, "--images=images", "--classes=[red,blue,green]"])
    main([*COMMAND, "--images=images", "--classes=[red,blue,green]", "--trust-classes=true"])


def test_options_of_the_network_become_one_dictionary(tmp_path):
    arguments = ["--network", "a.B", "--network.n=3", "--network.names", "[x,y]", "--image-size", "8", "--max-loss=0.1"]
    *rest, name, given = prepare(arguments)
    assert rest == ["--network", "a.B", "--image_size", "8", "--max_loss=0.1"]
    assert (name, json.loads(given)) == ("--network_arguments", {"n": 3, "names": ["x", "y"]})
    assert prepare(["--classes", "[no,1, 'two words']"]) == ["--classes", '["no", "1", "two words"]']
    (tmp_path / "names.txt").write_text("no\n1\n\n")
    assert prepare([f"--classes={tmp_path / 'names.txt'}"]) == ["--classes", '["no", "1"]']


def test_functions_of_torchvision_and_timm(tmp_path):
    shape = (3, 32, 32)
    assert count_classes(load_network("torchvision.models.resnet18", None, {"num_classes": 3}, **GIVEN), shape) == 3
    pytest.importorskip("timm")
    arguments = {"model_name": "resnet10t", "num_classes": 4}
    assert count_classes(load_network("timm.create_model", None, arguments, **GIVEN), shape) == 4


def test_a_network_of_another_image_size_is_said(owner):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    assert count_classes(network, (3, 16, 16)) == 3
    with pytest.raises(
        ValueError, match=r"`image_size` to be the height and width that Sequential takes .* \(3, 8, 8\)"
    ):
        count_classes(network, (3, 8, 8))


class Config:
    """As the configurations of transformers are made."""

    def __init__(self, num_labels=2):
        self.num_labels = num_labels


class WithConfig(nn.Module):
    """As the models of transformers are made."""

    config_class = Config

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(12, config.num_labels)

    def forward(self, images):
        return {"logits": self.fc(images.flatten(1))}


class Module(pl.LightningModule):
    def __init__(self, width, num_classes=5):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, images):
        return self.net(images)


def test_a_class_with_a_configuration():
    network = load_network(f"{__name__}.WithConfig", None, {"num_labels": 6}, **GIVEN)
    assert count_classes(network, (3, 2, 2)) == 6


def test_a_lightning_module_takes_its_arguments_from_its_checkpoint(tmp_path):
    module = Module(width=7, num_classes=3)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    network = load_network(f"{__name__}.Module", str(tmp_path / "m.ckpt"), **GIVEN)
    assert torch.equal(network.network.net[1].weight, module.net[1].weight)
    assert count_classes(network, (3, 2, 2)) == 3


def test_weights_of_a_network_in_a_file_of_the_working_folder(owner):
    network = load_network("mine.Colours", "suspicious.safetensors", {}, **GIVEN)
    assert torch.equal(network.network.fc.weight, load_file("suspicious.safetensors")["fc.weight"])
