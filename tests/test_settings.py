"""Settings from end to end on tiny data, and what their YAML say."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from nba_lightning.networks import SmallCNN, WideResNet
from tests.benchmark_calls import BENCHMARKS, call

FILES = sorted((BENCHMARKS / "settings").glob("*.yaml"))
KINDS = ("1", "all_to_all")
TINY = """
group: found
about: scikit-learn's digits
source: {class_path: nba_lightning.data.Digits}
augment: {padding: 1, flip: false}
network: {class_path: nba_lightning.networks.SmallCNN, init_args: {width: 4, in_channels: 1}}
attack: {config: badnets}
implanting:
  clean: {epochs: 3}
  poisoned: {from: clean, epochs: 2, init_args: {lr: 0.05}}
models: {clean: own, poisoned: own_poisoned}
clean_images: 140
validation_fraction: 0.2
"""


STEPS = 46
"""Of a fit, in place of 450: 23 epochs of two batches of 50."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import keeping

    folder = tmp_path_factory.mktemp("settings")
    (folder / "tiny.yaml").write_text(TINY)

    def settings(*arguments):
        where = ("--work", folder / "work", "--results", folder / "r", "--only", folder / "tiny.yaml", "--seeds", "0")
        return call("settings", *where, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "LEAST_STEPS", STEPS)
        ran = settings("--defenses", "fine_tuning", "nad", "--rates", "sweep")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        yield folder, settings


def cell(folder, name):
    return json.loads((folder / "r" / f"tiny-{name}-0.json").read_text())


def test_a_cell_has_the_grid_s_keys_its_setting_and_its_group(run):
    folder, _ = run
    keys = {"setting", "group", "attack", "defense", "seed", "acc", "asr", "ra", "der", "seconds", "passes_per_image"}
    keys |= {"network", "source", "clean_fraction", "clean_images", "poison_rate", "settings", "versions", "hardware"}
    found = cell(folder, "nad@sweep")
    assert found.keys() >= keys
    assert (found["setting"], found["group"]) == ("tiny", "found")
    before = cell(folder, "none")
    assert before["asr"] > before["never_poisoned"]["asr"]


def test_a_sweep_takes_the_strongest_rate_that_keeps_the_held_out_accuracy_and_sees_no_trigger(run):
    folder, _ = run
    from nba_lightning.training.sweep import RATES, keeps, next_rate

    found = cell(folder, "fine_tuning@sweep")["sweeps"]["FineTuning"]
    kept = {float(r): keeps(value, found["baseline"], found["images"]) for r, value in found["accuracies"].items()}
    assert next_rate(RATES["SGD"], kept) is None  # all that could be the strongest were tried, and the middle one
    assert list(kept) == sorted(kept, reverse=True)
    assert 0.025 in kept
    assert found["chosen"] == max(rate for rate, good in kept.items() if good)
    assert cell(folder, "nad@sweep")["sweeps"]["FineTuning"] == found  # its teacher
    assert not {"asr", "ra"} & found.keys()


def test_the_cost_of_a_sweep_is_that_of_all_its_fits(run):
    folder, _ = run
    found = cell(folder, "fine_tuning@sweep")
    one = (2 * STEPS * 50 + 50 + 2) / found["clean_images"]  # and a look and a check
    assert found["passes_per_image"] == pytest.approx(one * len(found["sweeps"]["FineTuning"]["accuracies"]), rel=0.01)


@pytest.mark.parametrize(
    ("left", "right", "taken", "tried"),
    [(0.2, 0.75, 0.071, ["0.071"]), (0.2, 0.6, 0.05, ["0.071"]), (0.1, 0.75, 0.05, [])],
)
def test_where_a_witness_shows_a_backdoor_a_rate_between_is_tried(monkeypatch, left, right, taken, tried):
    import teachers
    from keeping import Kept

    class Compared(teachers.Teachers):
        def _compare(self):
            self.told.update(left=left, taken=self.told["chosen"], witness=0.1)

    data = SimpleNamespace(partition=SimpleNamespace(validation=range(100)))
    subject = SimpleNamespace(weights="suspicious", datamodule=data)
    monkeypatch.setattr(teachers, "at_rate", lambda found, rate, subject: f"{rate:g}")
    monkeypatch.setattr(teachers, "kept_fit", lambda args, found, subject: Kept(found, passes=10))
    monkeypatch.setattr(teachers, "accuracy_of", lambda subject, path: 0.8 if path == "suspicious" else right)
    cost = Kept("0.05", sweeps={"FineTuning": {"chosen": 0.05, "accuracies": {"0.1": 0.6, "0.05": 0.78}}})
    found = Compared(None, "asked", "found", subject, {0.1: Kept("0.1"), 0.05: Kept("0.05")}, cost)
    assert found.taken(max_loss=0.0875) == taken
    told = cost.sweeps["FineTuning"]
    assert [rate for rate in told["accuracies"] if rate not in ("0.1", "0.05")] == tried
    assert cost.passes == 10 * len(tried)
    assert told["chosen"] == taken


@pytest.mark.parametrize(("after", "path"), [(0.77, "unlearned"), (0.74, "student"), (None, "student")])
def test_what_is_suspected_is_unlearned_from_the_student_on_unless_it_costs_too_much(monkeypatch, after, path):
    import chain
    from common import config
    from keeping import Kept, Subject

    right = {"suspicious": 0.8, "student": 0.78, "unlearned": after}
    data = SimpleNamespace(partition=SimpleNamespace(validation=range(1000), clean=range(300)))
    spec = {"class_path": "nba_lightning.networks.SmallCNN", "init_args": {"width": 4}}
    subject = Subject("cell", spec, "suspicious", data, 0)
    asked = []

    def fit(args, found, subject):
        asked.append(found)
        return Kept(after and "unlearned", passes=10, sweeps={"unlearning": {"reached": 0.6}})

    monkeypatch.setattr(chain, "kept_fit", fit)
    monkeypatch.setattr(chain, "accuracy_of", lambda subject, path: right[path])
    monkeypatch.setattr(Subject, "loaded", lambda self, weights: SmallCNN(width=4))
    cost = Kept("student", passes=5, sweeps={"FineTuning": {"taken": 0.006}})
    chain.unlearn(None, config("defense", "nba"), subject, Kept("teacher"), [3], cost)
    given = asked[0]["model"]["init_args"]
    assert (given["start_weights"], given["teacher_weights"], given["classes"]) == ("student", "teacher", [3])
    assert given["lr"] == pytest.approx(0.002)
    assert asked[0]["trainer"]["max_epochs"] * (300 // 50) >= 200
    assert (cost.path, cost.passes) == (path, 15)
    assert cost.sweeps["unlearning"].get("taken") == (after and path == "unlearned")
    assert cost.sweeps["unlearning"]["reached"] == 0.6


@pytest.mark.parametrize(("ablation", "epochs"), [("steps_900", 20), ("steps_112", 3), ("no_alignment", 10)])
def test_an_ablation_asks_for_other_steps_of_student_and_teacher(ablation, epochs):
    from common import HERE, config, merged
    from keeping import settings_of

    change = yaml.safe_load((HERE / "ablations" / f"{ablation}.yaml").read_text())
    network = {"class_path": "nba_lightning.networks.SmallCNN", "init_args": {"width": 4}}
    for sweep in (False, True):
        told = settings_of(merged(config("defense", "nba"), change), 2250, network, sweep)
        assert (told["epochs"], told["teacher"]["epochs"]) == (epochs, epochs)


def test_what_is_there_is_kept_and_a_model_that_is_given_is_taken(run, tmp_path):
    folder, settings = run
    times = {path: path.stat().st_mtime_ns for path in (folder / "r").iterdir()}
    ran = settings("--defenses", "fine_tuning", "nad", "--rates", "sweep")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "r").iterdir()} == times
    for name in ("own", "own_poisoned"):
        save_file(SmallCNN(width=4, in_channels=1).state_dict(), tmp_path / f"{name}.safetensors")
    there = ("--work", tmp_path / "work", "--results", tmp_path / "r", "--only", folder / "tiny.yaml")
    ran = call("settings", *there, "--models", tmp_path, "--defenses")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    files = json.loads((tmp_path / "work" / "models" / "tiny.json").read_text())
    assert files == [str(tmp_path / "own.safetensors"), str(tmp_path / "own_poisoned.safetensors"), ""]
    assert not list((tmp_path / "work" / "models").glob("*.safetensors"))


def test_a_network_that_nobody_poisoned_is_its_own_suspicious_model_and_has_no_means(run, tmp_path):
    nobody = TINY.replace("group: found", "group: clean").replace("epochs: 2,", "epochs: 0,")
    (tmp_path / "nobody.yaml").write_text(nobody)
    save_file(SmallCNN(width=4, in_channels=1).state_dict(), tmp_path / "own.safetensors")
    there = ("--work", tmp_path / "work", "--results", tmp_path / "r", "--only", tmp_path / "nobody.yaml")
    ran = call("settings", *there, "--models", tmp_path, "--defenses")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "r" / "nobody-none-0.json").read_text())
    assert {name: found[name] for name in found["never_poisoned"]} == found["never_poisoned"]
    shown = call("report", "--settings", "--results", tmp_path / "r")
    assert "**Networks that nobody poisoned: what cleaning them costs.**\n\n| setting |" in shown.stdout


def test_the_report_says_the_group_and_marks_the_best(run):
    folder, _ = run
    shown = call("report", "--settings", "--results", folder / "r")
    assert shown.returncode == 0, shown.stderr
    assert "Settings on which the defaults of NBA were found." in shown.stdout
    assert "| tiny | *undefended* | 1 |" in shown.stdout
    assert "| tiny | *never poisoned* | 1 |" in shown.stdout
    best = max(cell(folder, name)["acc"] for name in ("fine_tuning@sweep", "nad@sweep"))
    assert f"| **{100 * best:.1f}** |" in shown.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_setting_is_complete(path):
    found = yaml.safe_load(path.read_text())
    keys = {"group", "about", "source", "augment", "network", "attack", "implanting", "clean_images"}
    assert found.keys() - {"models"} == keys | {"validation_fraction"}
    assert found["group"] in ("found", "reported", "clean")
    assert (found["group"] == "clean") == (found["implanting"]["poisoned"].get("epochs") == 0)
    assert found["implanting"].keys() - {"keys"} == {"clean", "poisoned"}
    from common import build, config, merged, poisoned_training

    from nba_lightning.attacks import Attack

    stage = found["implanting"]["poisoned"]
    assert stage.get("from", "clean") == "clean"
    module, _, _ = poisoned_training(found["attack"]["config"], stage.get("implant"))
    assert module["class_path"].endswith("FlattenedTraining") == (stage.get("implant") == "flattened")
    assert module["class_path"].endswith("GrondTraining") == (found["attack"]["config"] == "grond")
    spec = config("attack", found["attack"]["config"])["data"]["init_args"]["attack"]
    own = {name: value for name, value in found["attack"].get("init_args", {}).items() if name != "pattern"}
    assert isinstance(build(Attack, merged(spec, {"init_args": own})), Attack)


@pytest.mark.parametrize("attack", ["badnets", "blended", "wanet"])
def test_all_to_all_and_one_percent_are_shipped(attack):
    from implanting import attack_of

    one, whole = (yaml.safe_load((BENCHMARKS / "settings" / f"wrn_{attack}_{n}.yaml").read_text()) for n in KINDS)
    rare, every = attack_of(one), attack_of(whole)
    assert (rare.poison_rate, rare.all_to_all) == (0.01, False)
    assert (every.poison_rate, every.all_to_all) == (0.1, True)
    every.prepare((3, 32, 32), 10)
    assert every.relabel(torch.arange(10)).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert every.eligible(torch.arange(10)).all()


def test_an_implant_is_named_by_its_setting_unless_the_attack_has_its_own():
    from common import poisoned_training

    def named(*arguments):
        module, train_on, more = poisoned_training(*arguments)
        return module["class_path"].rpartition(".")[2], train_on, more

    assert named("badnets", None) == ("Classifier", "poisoned", 0)
    assert named("badnets", "flattened") == ("FlattenedTraining", "poisoned", 0)
    assert named(None, "flattened") == ("Classifier", "poisoned", 0)  # a model that nobody poisons
    assert named("input_aware", None) == ("InputAwareTraining", "untriggered", 2)
    with pytest.raises(ValueError, match="Expected no `implant` for input_aware.*but got 'flattened'"):
        poisoned_training("input_aware", "flattened")


def test_the_key_mapping_of_the_stranger_covers_its_network(tmp_path):
    import argparse

    from implanting import converted, read_setting

    own = WideResNet(16, 1, mean=0.0, std=1.0)
    theirs = {}
    for name, value in own.state_dict().items():
        if not name.startswith("normalize."):
            parts = name.replace("shortcut", "convShortcut").split(".")
            parts = [f"block{parts[0][-1]}", "layer", *parts[1:]] if parts[0].startswith("layer") else parts
            theirs[".".join(["bn1", *parts[1:]] if parts[0] == "bn" else parts)] = value.clone()
    save_file(theirs, tmp_path / "nad-wrn16-1-grid-target5.safetensors")
    folders = {"root_cifar": tmp_path, "root_photos": None, "root_fashion": None, "strangers": tmp_path}
    args = argparse.Namespace(work=tmp_path, **folders)
    path = converted(args, read_setting(args, "nad_stranger"), "poisoned")
    other = WideResNet(16, 1, mean=0.0, std=1.0)
    from nba_lightning.io.weights import load_weights

    load_weights(other, path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in own.state_dict().items())


def test_a_folder_that_is_missing_is_asked_for_by_its_option(tmp_path):
    ran = call("settings", "--work", tmp_path, "--results", tmp_path, "--only", "fashion_cnn")
    assert ran.returncode == 1
    assert "Expected `--root-fashion` to be given" in ran.stdout


def test_an_unknown_setting_is_told(tmp_path):
    ran = call("settings", "--work", tmp_path, "--results", tmp_path, "--only", "nothing")
    assert "Expected `--only` to name a YAML file or one of digits" in ran.stdout


def test_a_part_of_a_source_counts_its_classes_in_the_given_order():
    from extra_sources import Part

    from nba_lightning.data import Digits

    part = Part(Digits(), classes=["7", "2"], train_images=5, image_size=16)
    train, test = part.load()
    assert part.check(train, test) == ["7", "2"]
    assert torch.bincount(train.labels).tolist() == [5, 5]
    assert train.shape == (1, 16, 16)
    whole, _ = Digits().load()
    sevens = whole.read((whole.labels == 7).nonzero().flatten())
    small = Part(Digits(), classes=["7", "2"], train_images=5).load()[0]
    assert all((image == sevens).flatten(1).all(1).any() for image in small.read(torch.arange(5)))


def test_the_smooth_picture_is_smooth_strong_and_the_same_again(tmp_path):
    from extra_sources import smooth_picture
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    for name in ("one", "two"):
        smooth_picture(tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = pil_to_tensor(Image.open(tmp_path / "one.png")).float() / 255
    assert picture.std() > 0.3
    assert picture.diff(dim=1).abs().max() < 0.1
    assert picture.diff(dim=2).abs().max() < 0.1


@pytest.mark.parametrize("name", ["fashion_vit", "resnet18_64"])
def test_strangers_networks_fit_their_images_and_name_layers(name):
    from common import build

    from nba_lightning.core.features import features
    from nba_lightning.core.layers import resolve_layers
    from nba_lightning.io.adapters import check_fit

    spec = yaml.safe_load((BENCHMARKS / "settings" / f"{name}.yaml").read_text())["network"]
    network = build(torch.nn.Module, spec)
    shape = (1, 28, 28) if name == "fashion_vit" else (3, 64, 64)
    check_fit(network, shape, spec["init_args"]["num_classes"])
    layers = resolve_layers(network, None)
    assert len(features(network, torch.rand(2, *shape), layers)[1]) == len(layers) >= 3
