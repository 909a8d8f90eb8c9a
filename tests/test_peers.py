"""Other code bases are timed beside ours over as many images; the clones here are stand-ins of our own."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from nba_lightning import BackdoorDataModule
from nba_lightning.networks import SmallCNN
from tests.benchmark_calls import call

LOOP = """
from utils.util import NAME
assert NAME == "nad"
pd = accuracy = None
def train_step(opt, loader, nets, optimizer, criterions, epoch):
    for images, labels in loader:
        criterions["criterionCls"](nets["snet"](images)[3], labels).backward()
        assert 0 <= float(accuracy(nets["snet"](images)[3], labels, topk=(1, 5))[1]) <= 100
        optimizer.step()
def test(opt, clean, bad, nets, criterions, epoch):
    for images, _ in [*clean, *bad]:
        nets["snet"](images.cuda())
    pd.DataFrame([]).to_csv("nowhere.csv")
"""
NAD = {
    "main.py": LOOP,
    "train_badnet.py": LOOP,
    "utils/util.py": "NAME = 'nad'",
    "config.py": """
import argparse
def get_arguments():
    found = argparse.ArgumentParser()
    found.set_defaults(lr=0.1, momentum=0.9, weight_decay=1e-4, p=2, cuda=1)
    return found
""",
    "at.py": "AT = float",
    "models/wresnet.py": """
from torch import nn
class WideResNet(nn.Module):
    def __init__(self, depth, num_classes, widen_factor, dropRate):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
    def forward(self, images):
        return images, images, images, self.fc(images.mean((2, 3)))
""",
    "data_loader.py": """
import pandas, cv2
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.functional import to_tensor
class Tensors:
    def __init__(self, images):
        self.images = images
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        image, label = self.images[index]
        return to_tensor(image), label
def get_train_loader(opt):
    assert (opt.cuda, opt.ratio, opt.batch_size) == (0, 1.0, 64)
    return DataLoader(Tensors(datasets.CIFAR10(root="nowhere", train=True, download=True)), 64)
def get_test_loader(opt):
    return get_train_loader(opt), get_train_loader(opt)
""",
}
BACKDOORBENCH = {
    "utils/bd_dataset_v2.py": """
import numpy as np
class prepro_cls_DatasetBD_v2:
    def __init__(self, images, poison_indicator, bd_image_pre_transform, bd_label_pre_transform):
        self.images, self.poisoned, self.indices = images, poison_indicator, np.arange(len(images))
        self.image, self.label = bd_image_pre_transform, bd_label_pre_transform
    def subset(self, indices):
        self.indices = indices
    def __len__(self):
        return len(self.indices)
    def __getitem__(self, item):
        index = int(self.indices[item])
        image, true = self.images[index]
        image = np.array(image)
        if not self.poisoned[index]:
            return image, true, index, 0, true
        changed = self.image(image.copy(), target=true, image_serial_id=index)
        assert (changed != image).any()
        return changed.astype(np.uint8), self.label(true), index, 1, true
class dataset_wrapper_with_transform:
    def __init__(self, images, transform):
        self.images, self.transform = images, transform
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        image, *others = self.images[index]
        return self.transform(image), *others
""",
    "utils/trainer_cls.py": """
class BackdoorModelTrainer:
    def __init__(self, model):
        self.model = model
    def set_with_dataloader(self, loader, tests, criterion, optimizer, *others):
        self.loader, self.criterion, self.optimizer = loader, criterion, optimizer
    def train_one_epoch_on_mix(self, verbose):
        for images, labels, _, _, _ in self.loader:
            self.criterion(self.model(images), labels).backward()
            self.optimizer.step()
    def test_given_dataloader(self, loader, verbose):
        for images, *_ in loader:
            self.model(images)
    test_given_dataloader_on_mix = test_given_dataloader
""",
    "utils/aggregate_block/dataset_and_transform_generate.py": """
from torchvision.transforms.functional import to_tensor
def get_transform(name, height, width, train):
    return to_tensor
""",
    "utils/bd_img_transform/patch.py": """
class AddMaskPatchTrigger:
    def __init__(self, patch):
        self.patch = patch
    def __call__(self, image):
        return image * (self.patch == 0) + self.patch
""",
    "utils/bd_img_transform/blended.py": """
def blendedImageAttack(other, share):
    return lambda image: (1 - share) * image + share * other
""",
    "attack/wanet.py": """
import sys
sys.path = ["./"] + sys.path
from utils.bd_dataset_v2 import np
class Wanet:
    def train_step(self, model, optimizer, schedule, loader, field, identity, epoch, opt):
        assert self.device.type == "cpu" and field.shape == identity.shape == (1, 32, 32, 2)
        for images, labels in loader:
            model(images).sum().backward()
            optimizer.step()
""",
}


def folder(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.fixture
def clones(tmp_path):
    found = {"nad": folder(tmp_path / "nad", NAD), "backdoorbench": folder(tmp_path / "bench", BACKDOORBENCH)}
    return [part for name, path in found.items() for part in (f"--{name}", path)]


@pytest.fixture(autouse=True)
def threads():
    """The script takes one thread, for its own process."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture
def peers():
    call("peers", "--help")
    return importlib.import_module("peers")


def test_both_sides_are_timed_over_the_images_that_they_read(peers, clones, tmp_path, monkeypatch):
    """With a clock that goes on by a second for each image that either side reads, each takes a second per image."""
    clock, sides = [0.0], []
    clones_module, ours = importlib.import_module("clones"), importlib.import_module("peers_ours")
    read, transfer = clones_module.Pictures.__getitem__, BackdoorDataModule.on_after_batch_transfer

    def one(pictures, index):
        clock[0] += 1
        return read(pictures, index)

    def batch(data, given, index):
        clock[0] += len(given.images)
        return transfer(data, given, index)

    def both(args, first, second):
        sides.append((first(), second()))
        return {"mean": sides[-1][0] / sides[-1][1], "std": 0.0, "n": 1}

    monkeypatch.chdir(tmp_path)  # where weights are left
    monkeypatch.setattr(clones_module.Pictures, "__getitem__", one)
    monkeypatch.setattr(BackdoorDataModule, "on_after_batch_transfer", batch)
    monkeypatch.setattr(peers, "ratio", both)
    monkeypatch.setattr(ours, "network", lambda _: SmallCNN(width=4))
    for module in (ours, importlib.import_module("timing")):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    result = tmp_path / "peers.json"
    ran = call("peers", *clones, "--images", 64, "--result", result)
    assert ran.returncode == 0, ran.stderr
    assert dict(zip(peers.RATIOS, sides, strict=True)) == dict.fromkeys(peers.RATIOS, (1.0, 1.0))
    written = json.loads(result.read_text())
    assert list(written["ratios"]) == list(peers.RATIOS)
    assert written["ratios"]["nad_input"] == {"images": 64, "mean": 1.0, "std": 0.0, "n": 1}
    assert (written["precision"], written["network"]) == ("32-true", "wide_resnet16_1")


def test_a_ratio_has_a_spread_and_leaves_no_module_behind(clones, tmp_path):
    result, before, path = tmp_path / "peers.json", set(sys.modules), list(sys.path)
    sys.modules["utils"] = ours = SimpleNamespace()  # of somebody else
    chosen = ["--only", "nad_input", "backdoorbench_input_badnets"]
    try:
        ran = call("peers", *clones, *chosen, "--images", 64, "--rounds", 2, "--result", result)
        assert sys.modules.pop("utils") is ours
    finally:
        sys.modules.pop("utils", None)
    assert ran.returncode == 0, ran.stderr
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == chosen[1:]
    found = json.loads(result.read_text())["ratios"]["nad_input"]
    assert found["n"] == 2
    assert found["mean"] > 0
    assert sys.path == path
    theirs = {"main", "train_badnet", "data_loader", "config", "at", "models", "attack", "cv2"}
    assert not theirs & ({name.partition(".")[0] for name in sys.modules} - before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "Expected `--backdoorbench` and `--nad`, the folder of a clone."),
        (["--nad", "full", "--only", "backdoorbench_evaluation"], "Expected `--backdoorbench`, the folder of a clone."),
        (["--nad", "missing"], "clone of github.com/bboylyg/NAD, but missing is no folder."),
        (["--nad", "empty"], "clone of github.com/bboylyg/NAD, but empty has no main.py."),
        (["--backdoorbench", "full"], "BackdoorBench, but full has no utils/bd_dataset_v2.py."),
        (["--nad", "broken"], "but importing it fails: ModuleNotFoundError: No module named 'nowhere'"),
        (["--nad", "full", "--images", "100"], "`--images` to be a multiple of 64 (no batch is dropped), but got 100."),
    ],
)
def test_what_is_no_clone_is_said_in_one_line(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "full", NAD)
    folder(tmp_path / "broken", NAD | {"at.py": "import nowhere"})
    ran = call("peers", *given, "--result", "peers.json")
    assert ran.returncode == 1
    assert ran.stderr.strip().endswith(said)
    assert ran.stderr.strip().count("\n") == 0
    assert not (tmp_path / "peers.json").exists()
