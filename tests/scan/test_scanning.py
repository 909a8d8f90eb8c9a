"""Scans in a Trainer, and real backdoors: the target of BadNets on digits has the smallest p-value."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar

from nba_lightning import BackdoorDataModule, FineTuning
from nba_lightning.attacks import BadNets
from nba_lightning.networks import SmallCNN
from nba_lightning.scan import ClassShift, MaximumMargin, Scanning, TeacherDisagreement
from tests.scan.zoo import planted, same, snapshot

TARGET = 3


def data(**kwargs):
    return BackdoorDataModule(attack=BadNets(size=2, target=TARGET), **({"batch_size": 64} | kwargs))


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory):
    def trainer(**kwargs):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("t"), **quiet, **kwargs)

    torch.manual_seed(0)
    return planted(data(), trainer, epochs=12)


@pytest.mark.parametrize("scan", [MaximumMargin(starts=10), ClassShift()], ids=lambda scan: scan.name)
def test_the_target_of_a_real_backdoor_has_the_smallest_p_value(backdoored, trainer, scan):
    before = snapshot(backdoored)
    module = Scanning(backdoored, [scan])
    logged = trainer().test(module, data(train_on="clean", batch_size=16), verbose=False)
    assert module.results[0].suspect == TARGET
    assert logged[0][f"scan/{scan.name}/p_value"] == pytest.approx(module.results[0].p_value)
    after = snapshot(backdoored)
    assert all(same(before[key], after[key]) for key in ("state", "grads", "needs", "modes", "hooks"))


def test_the_target_is_what_only_the_network_falls_for(backdoored, trainer):
    teacher = FineTuning(copy.deepcopy(backdoored), lr=0.05)
    clean = data(train_on="clean", batch_size=16, clean_fraction=0.2)
    trainer(max_epochs=8).fit(teacher, clean)
    module = Scanning(backdoored, [TeacherDisagreement(teacher.model, rms=(0.1, 0.2))])
    trainer().test(module, clean, verbose=False)
    assert module.results[0].suspect == TARGET


def test_trainer_and_function_give_the_same(trainer):
    network = SmallCNN(width=4, in_channels=1)
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    scans = [ClassShift(max_images=30), MaximumMargin(starts=2, steps=3)]
    module = Scanning(network, scans)
    trainer(enable_progress_bar=True, callbacks=[RichProgressBar()]).test(module, loader, verbose=False)
    for result, scan in zip(module.results, scans, strict=True):
        assert result.statistics == scan(network, loader).statistics


def test_scanning_without_a_scan_is_refused():
    with pytest.raises(ValueError, match=r"`len\(scans\)` to be at least 1"):
        Scanning(SmallCNN(), [])
