"""Re-activation: which images the attacker has, what he does with them, and where it is told."""

import argparse
import json

import pytest
import torch

from nba_lightning.attacks import SIG, BadNets, WaNet
from nba_lightning.data import Digits
from nba_lightning.io.weights import load_weights, save_weights
from nba_lightning.networks import SmallCNN
from tests.benchmark_calls import call
from tests.test_settings import TINY


def attackers(attack, seed=0, share=0.05, poisoned=5):
    from reactivation import AttackersImages

    attack.prepare((1, 8, 8), 10)
    return AttackersImages(Digits(), attack, share, poisoned, seed)


@pytest.mark.parametrize(
    "attack", [BadNets(target=3, pattern="white"), SIG(target=3), BadNets(all_to_all=True), WaNet(target=3)], ids=str
)
def test_five_images_carry_the_trigger_of_tests_and_the_attacker_s_label(attack):
    found = attackers(attack)
    whole, test = Digits().load()
    own, same_test = found.load()
    assert torch.equal(same_test.labels, test.labels)
    kept, chosen = found.kept, found.chosen
    assert len(chosen) == 5
    assert not set(kept.tolist()) & set(chosen.tolist())
    shares = torch.bincount(whole.labels[kept]) / torch.bincount(whole.labels)
    assert (shares - 0.05).abs().max() < 0.005  # class by class
    assert len(own) == len(kept) + 5
    assert torch.equal(own.read(torch.arange(len(kept))), whole.read(kept))
    assert torch.equal(own.labels[: len(kept)], whole.labels[kept])
    last = torch.arange(len(kept), len(own))
    triggered = attack(whole.read(chosen).float() / 255)
    assert (own.read(last).float() / 255 - triggered).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(own.labels[last], attack.relabel(whole.labels[chosen]))
    assert (own.labels[last] != whole.labels[chosen]).all()


def test_the_draw_is_that_of_its_seed():
    first, again, other = attackers(BadNets()), attackers(BadNets()), attackers(BadNets(), seed=1)
    assert torch.equal(first.kept, again.kept)
    assert torch.equal(first.chosen, again.chosen)
    assert not torch.equal(first.kept, other.kept)
    assert not torch.equal(first.chosen, other.chosen)
    with pytest.raises(ValueError, match="Expected 5000 images to poison"):
        attackers(BadNets(), poisoned=5000)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A setting whose models were made elsewhere, with one cleaned model."""
    folder = tmp_path_factory.mktemp("reactivation")
    (folder / "tiny.yaml").write_text(TINY)
    files = {name: folder / "work" / "models" / f"{name}.safetensors" for name in ("clean", "poisoned")}
    files["cleaned"] = folder / "work" / "cleaned" / "tiny-nad-0.safetensors"
    for seed, path in enumerate(files.values()):
        torch.manual_seed(seed)
        save_weights(SmallCNN(width=4, in_channels=1).state_dict(), path)
    (folder / "work" / "models" / "tiny.json").write_text(json.dumps([*map(str, list(files.values())[:2]), ""]))
    (folder / "settings").mkdir()
    figures = {"setting": "tiny", "group": "found", "acc": 0.9, "asr": 0.1, "ra": 0.8, "der": 0.9, "seed": 0}
    for name, more in {"none": {"never_poisoned": figures}, "nad": {}, "sau": {"error": "ValueError: no"}}.items():
        (folder / "settings" / f"tiny-{name}-0.json").write_text(json.dumps({**figures, **more, "defense": name}))

    def again(*arguments):
        told = ("--settings-results", folder / "settings", "--results", folder / "reactivation")
        return call("reactivation", "--work", folder / "work", "--only", folder / "tiny.yaml", *told, *arguments)

    ran = again()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, again


def cell(folder, name):
    return json.loads((folder / "reactivation" / f"tiny-{name}-0.json").read_text())


def test_every_cleaned_model_is_reactivated_beside_one_that_was_never_poisoned(run):
    folder, _ = run
    assert sorted(path.stem for path in (folder / "reactivation").iterdir()) == [
        "tiny-nad-0",
        "tiny-never_poisoned-0",
    ]
    found = cell(folder, "nad")
    assert found["settings"] == {"poisoned_images": 5, "clean_share": 0.02, "epochs": 5, "lr": 0.01}
    assert found.keys() >= {"setting", "defense", "seed", "acc", "asr", "ra", "weights", "versions", "hardware"}
    assert found["weights"] != cell(folder, "never_poisoned")["weights"]


def test_what_is_there_is_kept_until_the_weights_are_others(run):
    folder, again = run
    path = folder / "reactivation" / "tiny-nad-0.json"
    before = path.stat().st_mtime_ns
    assert again().returncode == 0
    assert path.stat().st_mtime_ns == before
    weights = folder / "work" / "cleaned" / "tiny-nad-0.safetensors"
    kept = weights.read_bytes()
    save_weights(SmallCNN(width=4, in_channels=1).state_dict(), weights)
    assert again().returncode == 0
    assert path.stat().st_mtime_ns != before
    weights.write_bytes(kept)
    changed = json.loads(path.read_text())
    assert again().returncode == 0
    now = json.loads(path.read_text())
    assert now["weights"] != changed["weights"]
    path.write_text(json.dumps(now | {"asr": -1.0, "settings": now["settings"] | {"epochs": 1}}))
    assert again().returncode == 0
    assert json.loads(path.read_text()) == now


def test_the_table_has_one_column_more_and_there_is_a_figure(run, tmp_path):
    folder, again = run
    report = call("report", "--settings", "--results", folder / "settings")
    assert report.returncode == 0, report.stderr
    lines = report.stdout.splitlines()
    assert "| setting | defence | n | ACC | ASR | RA | DER | re-activated ASR | passes per image |" in lines
    for row, name in (("nad", "nad"), ("*never poisoned*", "never_poisoned"), ("*undefended*", None)):
        line = next(line for line in lines if line.startswith(f"| tiny | {row} |"))
        cells = line.split("|")
        assert len(cells) == 11
        assert cells[8].strip() == ("" if name is None else f"{100 * cell(folder, name)['asr']:.1f}")
    assert again("--figure", tmp_path / "figure.png").returncode == 0
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_a_model_of_one_s_own_is_looked_at_by_its_file(run, tmp_path):
    folder, _ = run
    files = {name: folder / "work" / "models" / f"{name}.safetensors" for name in ("clean", "poisoned")}
    attack = BadNets()
    attack.prepare((1, 8, 8), 10)
    save_weights(attack.state_dict(), tmp_path / "attack.safetensors")
    own = ("--only", folder / "tiny.yaml", "--weights", files["poisoned"], "--state", tmp_path / "attack.safetensors")
    where = ("--work", tmp_path, "--results", tmp_path / "r")
    ran = call("reactivation", *where, *own, "--never-poisoned", files["clean"])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "r").iterdir()}
    assert found.keys() == {"tiny-poisoned-0", "tiny-never_poisoned-0"}
    never = found["tiny-never_poisoned-0"]
    assert all(never[name] == cell(folder, "never_poisoned")[name] for name in ("acc", "asr", "ra", "weights"))
    assert call("reactivation", "--weights", files["poisoned"], "--results", tmp_path / "r").returncode == 2


def test_the_attacker_takes_five_epochs_of_plain_steps_at_one_rate(run, tmp_path):
    """All of his images are one batch, so the order does not matter and each epoch is a step."""
    from implanting import read_setting
    from reactivation import woken

    folder, _ = run
    args = argparse.Namespace(precision="32", work=tmp_path, strangers=None)
    args.root_cifar = args.root_photos = args.root_fashion = None
    setting, own = read_setting(args, str(folder / "tiny.yaml")), attackers(BadNets(), share=0.02)
    start = folder / "work" / "models" / "poisoned.safetensors"
    module = woken(args, setting, own, start, None, 0)
    network = SmallCNN(width=4, in_channels=1).train()
    load_weights(network, start)
    train, _ = own.load()
    assert 25 < len(train) < 128
    images, labels = train.read(torch.arange(len(train))).float() / 255, train.labels
    speeds = [torch.zeros_like(weight) for weight in network.parameters()]
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for weight, speed, gradient in zip(network.parameters(), speeds, gradients, strict=True):
                weight.sub_(0.01 * speed.mul_(0.9).add_(gradient))
    for mine, theirs in zip(module.model.state_dict().values(), network.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
