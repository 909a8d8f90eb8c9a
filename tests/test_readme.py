"""The README's examples run as they stand there, on few and small images."""

import re
from functools import partialmethod
from pathlib import Path

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from nba_lightning.defenses import unlearning
from nba_lightning.pseudo import ClassPatches, ClassPerturbations
from nba_lightning.training.search import Search
from nba_lightning.training.verification import Verification
from tests.app.conftest import write_images

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.split("## In your project")[1].split("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take for granted. Trainers are short, and quiet."""
    monkeypatch.chdir(tmp_path)
    fit = pl.Trainer.__init__

    def short(self, *args, max_epochs, **kwargs):
        max_epochs = min(max_epochs, 2)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        fit(self, *args, max_epochs=max_epochs, limit_train_batches=1, **quiet, **kwargs)

    monkeypatch.setattr(pl.Trainer, "__init__", short)
    least = {"sizes": (0.018,), "steps": 1, "images_each": 1, "images": 64, "images_elsewhere": 64, "grid": 0}
    quick = partialmethod(Search.__init__, **least)
    monkeypatch.setattr(Search, "__init__", quick)
    torch.manual_seed(0)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    torch.save({"model": resnet18(num_classes=10).state_dict(), "epoch": 3}, "suspicious.pth")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
    torch.save({f"module.{name}": value for name, value in vit.state_dict().items()}, "suspicious_vit.pth")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = (images - mean[:, None, None]) / std[:, None, None]
    return {
        "clean_loader": DataLoader(TensorDataset(images, labels), 2),
        "normalized_loader": DataLoader(TensorDataset(normalized, labels), 4),
        "suspicious_network": resnet18(num_classes=10),
        "fine_tuned_network": resnet18(num_classes=10),
        "__name__": "example",
    }


def test_there_are_five_and_they_are_short():
    assert len(EXAMPLES) == 5
    assert all(len(example.splitlines()) <= 30 for example in EXAMPLES)


def test_the_guarded_fit_runs_and_goes_on(names, tmp_path, capsys):
    write_images(tmp_path / "clean", 20, size=16)
    names["suspicious_network"] = resnet18(num_classes=3)
    with pytest.warns(UserWarning, match="With so few images the guard cannot know"):
        exec(EXAMPLES[4], names)
    assert names["trainer"].global_step == 2
    assert list((tmp_path / "runs" / "teacher").glob("last.ckpt"))
    assert capsys.readouterr().out.startswith("unknown With so few images")
    names["suspicious_network"] = resnet18(num_classes=3)
    exec(EXAMPLES[4], names)
    assert names["trainer"].ckpt_path.endswith("last.ckpt")


def test_what_was_suspected_is_unlearned(names, monkeypatch):
    keep = Verification.keep

    def suspecting(self, *args):
        share = keep(self, *args)
        self.suspected = self.to_unlearn = [3]
        return share

    monkeypatch.setattr(Verification, "keep", suspecting)
    monkeypatch.setattr(unlearning, "ClassPerturbations", lambda *args, **kwargs: ClassPerturbations((0.018,), 1, 1))
    monkeypatch.setattr(unlearning, "ClassPatches", lambda *args, **kwargs: ClassPatches(2, 1, 1))
    exec(EXAMPLES[1], names)
    assert names["unlearning"].classes == [3]
    assert names["cleaned"] is names["unlearning"].model
    assert not torch.equal(names["cleaned"].fc.weight, names["nba"].model.fc.weight)
    assert torch.equal(names["unlearning"].start.network.fc.weight, names["nba"].model.fc.weight)


@pytest.mark.parametrize("index", [0, 2, 3], ids=["torchvision", "timm", "lightning"])
def test_examples_run_as_they_stand(index, names):
    before = {name: value.clone() for name, value in names["suspicious_network"].state_dict().items()}
    exec(EXAMPLES[index], names)
    network = names.get("network", names["suspicious_network"])
    state = network.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    if index == 3:
        assert any(not torch.equal(value, before[name]) for name, value in state.items())
        assert names["module"].pseudo.bank.abs().max() > 0
    else:
        cleaned = list(Path.cwd().rglob("cleaned.safetensors"))
        assert len(cleaned) == 1
        loaded = torch.load("suspicious_vit.pth" if index else "suspicious.pth", weights_only=True)
        start = {name.removeprefix("module."): value for name, value in loaded.get("model", loaded).items()}
        assert state.keys() == start.keys()
        assert any(not torch.equal(value, start[name]) for name, value in state.items())
