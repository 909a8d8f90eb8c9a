"""A fit that was killed anywhere goes on from its last checkpoint to the same weights, bit by bit."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nba_lightning import ANP, NBA, BackdoorDataModule, Classifier, FineTuning, InputAwareTraining
from nba_lightning.attacks import BadNets, InputAware, WaNet
from nba_lightning.augmentation import RandomCropFlip
from nba_lightning.data.sampler import ResumableLoader
from nba_lightning.pseudo import UniversalPerturbations
from tests.test_modules import DEFENSES, build, states_equal


class Killed(Exception):  # noqa: N818
    """Not one that Lightning handles."""


class KillAfter(pl.Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batches:
            raise Killed


def fit(make, data, trainer, folder, kill=10**9, resume=False, every=2, **kwargs):
    """Fit with a checkpoint every second step; the module, or None where it was killed."""
    torch.manual_seed(3)
    module = make()
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=every)
    runner = trainer(enable_checkpointing=True, callbacks=[saver, KillAfter(kill)], **kwargs)
    try:
        runner.fit(module, data(), ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    except Killed:
        return None
    return module


def check(make, data, trainer, tmp_path, kills, **kwargs):
    whole = fit(make, data, trainer, tmp_path / "whole", **kwargs)
    for kill in kills:
        folder = tmp_path / str(kill)
        assert fit(make, data, trainer, folder, kill, **kwargs) is None
        resumed = fit(make, data, trainer, folder, resume=True, **kwargs)
        assert states_equal(whole.state_dict(), resumed.state_dict()), f"killed before step {kill}"


def defender():
    # Four batches an epoch.
    return BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=15, augment=RandomCropFlip(1))


@pytest.mark.parametrize("defense", DEFENSES)
def test_every_defense_goes_on_within_an_epoch(defense, network, trainer, tmp_path):
    check(lambda: build(defense, copy.deepcopy(network)), defender, trainer, tmp_path, [3, 7, 10], max_epochs=3)


@pytest.mark.parametrize("every", [1, 3])
def test_checkpoints_at_any_step_will_do(network, trainer, tmp_path, every):
    def make():
        return NBA(copy.deepcopy(network), teacher_epochs=1, pseudo=UniversalPerturbations(2, rms=0.2, steps=2))

    check(make, defender, trainer, tmp_path, [4, 5, 8, 9, 11], max_epochs=3, every=every)


def test_poisoned_training_goes_on_within_an_epoch(network, trainer, tmp_path):
    def poisoned():
        return BackdoorDataModule(attack=WaNet(), batch_size=256, augment=RandomCropFlip(1))

    check(lambda: Classifier(copy.deepcopy(network)), poisoned, trainer, tmp_path, [3, 8], max_epochs=2)


def test_joint_training_goes_on_within_an_epoch(network, trainer, tmp_path):
    def poisoned():
        return BackdoorDataModule(attack=InputAware(width=8), batch_size=256)

    def make():
        return InputAwareTraining(copy.deepcopy(network), mask_epochs=1)

    check(make, poisoned, trainer, tmp_path, [3, 8], max_epochs=2)


def test_accumulated_gradients_are_the_trainer_s_business(network, trainer, tmp_path):
    kwargs = {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    check(lambda: FineTuning(copy.deepcopy(network)), defender, trainer, tmp_path, [5, 10], **kwargs)


def test_anp_s_masks_are_in_range_in_every_checkpoint(network, trainer, tmp_path):
    assert fit(lambda: ANP(network, lr=5.0), defender, trainer, tmp_path, 3, max_epochs=2, every=1) is None
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    masks = torch.cat([value for name, value in state.items() if name.startswith("masks.")])
    assert masks.min() == 0.0  # the step went far below
    assert masks.max() <= 1.0


def test_disk_images_with_workers_go_on_too(trainer, tmp_path, image_folder, monkeypatch):
    from nba_lightning.data import ImageFolderSource
    from nba_lightning.networks import SmallCNN

    torch.manual_seed(0)
    network = SmallCNN(width=4, num_classes=2)

    def data():
        source = ImageFolderSource(str(image_folder), memory_limit_mib=0)
        return BackdoorDataModule(source, None, clean_fraction=0.25, batch_size=2, num_workers=1)

    seen = []

    class Look(FineTuning):
        def training_step(self, batch, batch_idx):
            seen.append(batch[1].tolist())
            return super().training_step(batch, batch_idx)

    def make():
        seen.append("fit")
        return Look(copy.deepcopy(network))

    check(make, data, trainer, tmp_path, [5], max_epochs=3, every=1)
    first, second = seen.index("fit"), [i for i, item in enumerate(seen) if item == "fit"]
    assert first == 0
    whole = seen[1 : second[1]]
    assert seen[second[1] + 1 : second[2]] + seen[second[2] + 1 :] == whole


def test_a_loader_draws_nothing_before_it_is_asked():
    drawn = []
    data = BackdoorDataModule(train_on="clean", batch_size=16)
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    loader.done = lambda: drawn.append(1) or 1
    iterator = iter(loader)
    assert drawn == []
    rest, every = list(iterator), list(loader)
    assert drawn == [1]  # only the first epoch can have been interrupted
    assert len(rest) == len(every) - 1
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, every[1:], strict=True))
