import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nba_lightning.app.cli import main
from nba_lightning.io.weights import save_weights
from nba_lightning.networks import SmallCNN

CONFIGS = Path(__file__).parent.parent / "configs"
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
BASE = {"data": "digits", "attack": "badnets", "defense": "none", "network": "small_cnn_digits"}


def compose(**parts):
    chosen = BASE | parts
    return [
        argument for kind, name in chosen.items() for argument in ("--config", str(CONFIGS / kind / f"{name}.yaml"))
    ]


def quick(tmp_path):
    return [
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.enable_model_summary",
        "false",
    ]


def run_fast(tmp_path, *arguments):
    main(["fit", *arguments, *quick(tmp_path), "--trainer.fast_dev_run", "2"])


SURROGATE = ["--data.attack.surrogate", "nba_lightning.networks.SmallCNN", "--data.attack.surrogate.in_channels", "1"]
NEEDS = {
    "attack/scar.yaml": [*SURROGATE, "--data.attack.steps", "1"],
    "attack/grond.yaml": [*SURROGATE, "--data.attack.steps", "1"],
    "attack/lc.yaml": [*SURROGATE, "--data.attack.steps", "1"],
    "attack/trojannn.yaml": [*SURROGATE, "--data.attack.steps", "1"],
    "attack/ftrojan.yaml": ["--data.attack.block", "8"],
    "attack/input_aware.yaml": ["--config", str(CONFIGS / "implant" / "input_aware.yaml")],
    "defense/unlearning.yaml": ["--model.classes", "[0]"],
}


@pytest.mark.parametrize(
    "name", [n for n in ALL if n.split("/")[0] in ("attack", "defense") and n != "attack/ssba.yaml"]
)
def test_shipped_attacks_and_defenses_run(name, tmp_path):
    kind, stem = name.removesuffix(".yaml").split("/")
    teacher = []
    if stem in ("nad", "nba", "nba_fast", "unlearning"):
        torch.manual_seed(9)  # other weights than those of the network that the command makes
        save_weights(SmallCNN(width=16, in_channels=1).state_dict(), tmp_path / "teacher" / "w.safetensors")
        teacher = ["--model.teacher_weights", str(tmp_path / "teacher" / "w.safetensors")]
    run_fast(tmp_path, *compose(**{kind: stem}), *NEEDS.get(name, []), *teacher, "--data.batch_size", "16")
    assert not list(tmp_path.glob("*.safetensors"))  # a fast_dev_run leaves nothing behind


@pytest.mark.parametrize(
    ("name", "module"), [("fine_tuned", "Classifier"), ("flattened", "FlattenedTraining"), ("grond", "GrondTraining")]
)
def test_shipped_implants_go_with_any_attack(name, module, tmp_path):
    weights = tmp_path / "clean" / "w.safetensors"
    save_weights(SmallCNN(width=16, in_channels=1).state_dict(), weights)
    parts = [f"--config={CONFIGS / part}.yaml" for part in ("data/digits", "attack/wanet", "network/small_cnn_digits")]
    implant = [
        f"--config={CONFIGS / 'implant' / name}.yaml",
        "--model.weights",
        str(tmp_path / "clean" / "w.safetensors"),
    ]
    run_fast(tmp_path, *parts, *implant, "--data.batch_size", "16")
    shown = yaml.safe_load((CONFIGS / "implant" / f"{name}.yaml").read_text())
    assert shown["model"]["class_path"].endswith(f".{module}")
    assert shown["data"]["init_args"]["train_on"] == "poisoned"


def test_scar_s_teacher_is_trained_by_its_config(tmp_path):
    parts = [f"--config={CONFIGS / part}.yaml" for part in ("data/digits", "attack/scar", "network/small_cnn_digits")]
    implant = [f"--config={CONFIGS / 'implant' / 'scar'}.yaml", *NEEDS["attack/scar.yaml"]]
    run_fast(tmp_path, *parts, *implant, "--data.batch_size", "16", "--model.fixed_point_steps", "2")


def test_ssba_in_two_commands_as_in_the_readme(tmp_path):
    parts = [
        argument
        for kind, name in (("data", "digits"), ("attack", "ssba"), ("implant", "steganography"))
        for argument in ("--config", str(CONFIGS / kind / f"{name}.yaml"))
    ]
    main(["fit", *parts, *quick(tmp_path), "--trainer.max_epochs", "1", "--checkpoint.dirpath", str(tmp_path)])
    state = ["--data.attack.state", str(tmp_path / "last.ckpt")]
    run_fast(tmp_path, *compose(attack="ssba"), *state, "--data.batch_size", "16")
    with pytest.raises(SystemExit, match="Expected `attack` to be trained for SSBA"):
        run_fast(tmp_path, *compose(attack="ssba"))
    with pytest.raises(SystemExit, match="Expected `attack` to be an SSBA for Steganography, but got BadNets"):
        run_fast(tmp_path, *parts, "--data.attack", "nba_lightning.attacks.BadNets")


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("network/") and "digits" not in n])
def test_shipped_networks_run(name, tmp_path, image_folder):
    parts = compose(data="image_folder", network=Path(name).stem)
    classes = ["--model.model.num_classes", "2"]
    folder = [
        "--data.source.root",
        str(image_folder),
        "--data.batch_size",
        "2",
        "--data.clean_fraction",
        "0.5",
        "--data.source.image_size",
        "32",
    ]
    run_fast(tmp_path, *parts, *classes, *folder, "--data.attack.poison_rate", "0.25")


def holds(shown, wanted):
    """Whether a configuration has all values of another, and defaults beside them."""
    if not isinstance(wanted, dict):
        return shown == wanted
    return all(name in shown and holds(shown[name], value) for name, value in wanted.items())


# `clean_images` is without an attack: see app/test_owner_configs.py
@pytest.mark.parametrize("name", [n for n in ALL if n.split("/")[0] in ("data", "trainer") and "clean_images" not in n])
def test_shipped_data_and_trainers_parse(name, capsys):
    kind, _stem = name.removesuffix(".yaml").split("/")
    with pytest.raises(SystemExit) as end:
        main(["fit", *compose(), *(["--config", str(CONFIGS / name)]), "--print_config"])
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load((CONFIGS / name).read_text())
    if kind == "trainer":
        assert holds(shown["trainer"], wanted["trainer"])
        assert shown["trainer"]["plugins"] == [{"class_path": "nba_lightning.io.checkpoints.SafeCheckpointIO"}]
    else:
        source = wanted["data"]["init_args"]["source"]
        assert shown["data"]["init_args"]["source"]["class_path"] == source["class_path"]


def test_implant_defend_test_predict_as_in_the_readme(tmp_path):
    main(
        [
            "fit",
            *compose(),
            *quick(tmp_path),
            "--checkpoint.dirpath",
            str(tmp_path / "implant"),
            "--trainer.max_epochs",
            "2",
        ]
    )
    suspicious = tmp_path / "implant" / "last.ckpt"
    common = [*quick(tmp_path), "--data.batch_size", "16", "--model.weights", str(suspicious)]
    teacher = tmp_path / "teacher" / "cleaned.safetensors"
    teach = ["fit", *compose(defense="teacher"), *common, "--checkpoint.dirpath", str(teacher.parent)]
    main([*teach, "--trainer.max_epochs", "1"])
    defend = [*compose(defense="nba"), *common, "--model.teacher_weights", str(teacher)]
    align = ["fit", *defend, "--checkpoint.dirpath", str(tmp_path / "nba")]
    main([*align, "--trainer.max_epochs", "2"])
    cleaned = load_file(tmp_path / "nba" / "cleaned.safetensors")
    theirs = SmallCNN(width=16, in_channels=1).state_dict()
    assert {name: value.dtype for name, value in cleaned.items()} == {n: v.dtype for n, v in theirs.items()}
    came_in = torch.load(suspicious, weights_only=True)["state_dict"]
    assert not torch.equal(cleaned["fc.weight"], came_in["model.fc.weight"])
    test = [*compose(defense="nba"), *quick(tmp_path), "--data.batch_size", "16"]
    main(["test", *test, "--model.weights", str(tmp_path / "nba" / "cleaned.safetensors")])  # needs no teacher
    main(["predict", *test, "--ckpt_path", str(tmp_path / "nba" / "last.ckpt")])
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert {row["loader"] for row in rows} == {"0", "1"}
    assert all(0.1 <= float(row["probability"]) <= 1.0 for row in rows)
    assert all(row["class"] == row["predicted"] for row in rows)  # digits are called by their numbers
    assert len({(row["loader"], row["index"]) for row in rows}) == len(rows)
    main([*align, "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    resumed = torch.load(tmp_path / "nba" / "last.ckpt", weights_only=True)
    assert resumed["epoch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.attack.target", "10"], "Expected `target` to be one of the 10 classes"),
        (["--data.attack.size", "9"], "Expected `size` to be at most the image's 8 pixels, but got 9"),
        (["--model.weights", "missing.pt"], "Expected `weights` to be an existing file"),
        (["--model.model.in_channels", "3"], "Expected `model` to be a network that takes images of shape"),
        (["--data.batch_size", "5000"], "Expected `batch_size` to be at most"),
        (["--data.source", "ImageFolderSource", "--data.source.root", "nowhere"], "Expected `root` to hold images"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_fast(tmp_path, *compose(), *arguments)
    assert message in f"{end.value.code} {capsys.readouterr().err}"


def test_weights_of_another_network_are_named(tmp_path, capsys):
    save_weights(SmallCNN(width=4, in_channels=1).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(SystemExit) as end:
        run_fast(tmp_path, *compose(), "--model.weights", str(tmp_path / "w.safetensors"))
    assert "wrong shape: block1.0.weight (4, 1, 3, 3) instead of" in f"{end.value.code} {capsys.readouterr().err}"


def test_weights_that_are_not_finite_stop_the_command(tmp_path):
    network = SmallCNN(width=16, in_channels=1)
    network.fc.weight.data.fill_(math.nan)
    save_weights(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(
        SystemExit, match="Expected `weights` to be finite as float32, but got NaN or infinity in: fc.weight"
    ):
        run_fast(tmp_path, *compose(), "--model.weights", str(tmp_path / "w.safetensors"))


def test_help_and_version_as_a_process():
    shown = subprocess.run(
        [sys.executable, "-m", "nba_lightning", "--help"], capture_output=True, text=True, check=True
    )
    assert all(word in shown.stdout for word in ("fit", "test", "predict", "demo"))
    shown = subprocess.run(
        [sys.executable, "-m", "nba_lightning", "demo", "--help"], capture_output=True, text=True, check=True
    )
    assert all(word in shown.stdout for word in ("--output", "--seed", "--attack", "folder for"))


def test_a_broken_checkpoint_is_reported_with_the_newest_good_one(tmp_path):
    run = ["fit", *compose(defense="fine_tuning"), "--data.batch_size", "8", *quick(tmp_path)]
    run += ["--checkpoint.dirpath", str(tmp_path)]
    main([*run, "--trainer.max_epochs", "1"])
    good = tmp_path / "last.ckpt"
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(good.read_bytes()[:500])
    with pytest.raises(SystemExit, match=r"broken\.ckpt' is truncated or corrupt"):
        main([*run, "--trainer.max_epochs", "2", "--ckpt_path", str(broken)])
