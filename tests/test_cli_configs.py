"""Configs by name, in any order."""

import shutil
from pathlib import Path

import pytest
import yaml

from nba_lightning.app import configs
from nba_lightning.app.cli import main
from nba_lightning.app.configs import arranged, find_config, read_config, shipped_names

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def named(*names):
    return [argument for name in names for argument in ("--config", name)]


@pytest.mark.parametrize("name", ["nba", "nba.yaml", "defense/nba", "defense/nba.yaml"])
def test_shipped_configs_are_found_by_name_from_any_folder(name, elsewhere):
    assert find_config(name).samefile(CONFIGS / "defense" / "nba.yaml")


def test_every_shipped_config_is_found_by_its_full_name(elsewhere):
    assert len(shipped_names()) == len(list(CONFIGS.rglob("*.yaml"))) > 30
    for name in shipped_names():
        assert find_config(name).samefile(CONFIGS / f"{name}.yaml")


def test_files_win_over_names_and_folders_do_not(elsewhere):
    (elsewhere / "nba").mkdir()
    assert find_config("nba").samefile(CONFIGS / "defense" / "nba.yaml")
    (elsewhere / "nad").write_text("trainer: {max_epochs: 1}\n")
    assert find_config("nad").samefile(elsewhere / "nad")


def test_the_folder_inside_an_installed_package_comes_first(tmp_path, monkeypatch):
    package = tmp_path / "nba_lightning"
    (tmp_path / "configs").mkdir()
    package.mkdir()
    monkeypatch.setattr(configs.resources, "files", lambda name: tmp_path / name)
    assert configs.shipped_folder() == tmp_path / "configs"
    shutil.copytree(CONFIGS / "defense", package / "configs" / "defense")
    assert configs.shipped_folder() == package / "configs"
    assert find_config("nba") == package / "configs" / "defense" / "nba.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "one config, attack/none or defense/none, but got 'none'"),
        ("input_aware", "attack/input_aware or implant/input_aware"),
        ("grond", "attack/grond or implant/grond"),
        ("badnet", "Did you mean attack/badnets"),
        ("data/nba", r"Did you mean defense/nba\?"),
        ("zzzz", "Shipped are attack/adap_blend, attack/adap_patch"),
        (".", "got the folder '.'"),
    ],
)
def test_names_that_are_no_config_get_a_sentence(name, message, elsewhere):
    with pytest.raises(ValueError, match=f"Expected `--config` to be .*{message}"):
        find_config(name)


def test_broken_yaml_is_named_with_file_and_line(elsewhere):
    (elsewhere / "bad.yaml").write_text("model:\n  init_args: {lr: 0.1\ntrainer: 3\n")
    with pytest.raises(SystemExit, match=r"Error: Expected 'bad.yaml' to be YAML, but got this in line 3, column 8"):
        main(["fit", "--config", "bad.yaml"])
    (elsewhere / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="Expected 'list.yaml' to hold settings such as `trainer:`, but got list"):
        read_config("list.yaml")
    (elsewhere / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="'bytes.yaml' to be YAML, but it is no text in UTF-8"):
        read_config("bytes.yaml")


def test_the_order_of_configs_does_not_matter(elsewhere, capsys):
    names = ["digits", "badnets", "nba", "small_cnn_digits"]
    forth, back = shown(capsys, *named(*names)), shown(capsys, *named(*reversed(names)))
    assert forth == back
    data, model = forth["data"]["init_args"], forth["model"]["init_args"]
    assert data["batch_size"] == 50  # the defence's, not 64 of the data
    assert data["train_on"] == "clean"
    assert data["attack"]["class_path"] == "nba_lightning.attacks.BadNets"
    assert model["model"]["init_args"]["width"] == 16


def test_later_configs_override_earlier_ones(elsewhere, capsys):
    for batch_size in (3, 4):
        (elsewhere / f"{batch_size}.yaml").write_text(f"data: {{init_args: {{batch_size: {batch_size}}}}}\n")
    parts = named("digits", "nba", "small_cnn_digits")
    assert shown(capsys, *named("3.yaml", "4.yaml"), *parts)["data"]["init_args"]["batch_size"] == 50
    assert shown(capsys, *parts, *named("3.yaml", "4.yaml"))["data"]["init_args"]["batch_size"] == 4
    assert shown(capsys, *parts, *named("4.yaml", "3.yaml"))["data"]["init_args"]["batch_size"] == 3


def test_flags_override_configs_wherever_they_stand(elsewhere, capsys):
    flags = ["--trainer.max_epochs", "3", "--data.batch_size=7", "--model", "NAD"]
    found = shown(capsys, *flags, *named("nba", "digits", "small_cnn_digits"))
    assert found["trainer"]["max_epochs"] == 3
    assert found["data"]["init_args"]["batch_size"] == 7
    assert found["model"]["class_path"].endswith(".NAD")


def test_a_flag_may_name_the_class_that_a_config_sets(elsewhere, capsys):
    found = shown(capsys, *named("nba", "small_cnn_digits"), "--data", "BackdoorDataModule")
    assert found["data"]["init_args"]["batch_size"] == 50


def test_a_class_that_nobody_names_is_asked_for():
    with pytest.raises(ValueError, match=r"names the class of `data`, but '.*nba.yaml' only sets its arguments"):
        arranged(["nba", "small_cnn_digits"])
    with pytest.raises(ValueError, match=r"names the class of `model`, but '.*small_cnn_digits.yaml'"):
        arranged(["digits", "small_cnn_digits"])


def test_configs_that_need_each_other_are_refused():
    first = "{model: {class_path: NBA}, data: {init_args: {seed: 1}}}"
    second = "{data: {class_path: BackdoorDataModule}, model: {init_args: {seed: 1}}}"
    with pytest.raises(ValueError, match="Name `model` and `data` in one file"):
        arranged([first, second])
