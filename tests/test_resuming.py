"""A fit that was killed anywhere goes on from its last checkpoint to the same weights, bit by bit."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nba_lightning import ANP, NBA, BackdoorDataModule, Classifier, FineTuning, InputAwareTraining
from nba_lightning.attacks import BadNets, InputAware, WaNet
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.data.sampler import BatchLoader
from nba_lightning.io.checkpoints import SafeCheckpointIO
from nba_lightning.pseudo import LatentPerturbations, UniversalPerturbations
from tests.test_modules import DEFENSES, another, build, states_equal

ROOT = Path(__file__).parent.parent


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
        return NBA(copy.deepcopy(network), teacher=another(network), pseudo=UniversalPerturbations(2, rms=0.2, steps=2))

    check(make, defender, trainer, tmp_path, [4, 5, 8, 9, 11], max_epochs=3, every=every)


def test_perturbed_features_go_on_within_an_epoch(network, trainer, tmp_path):
    """They serve 25 steps, so those of the first epoch are in every checkpoint."""

    def make():
        latent = LatentPerturbations(steps=2, images_each=2)
        return FineTuning(copy.deepcopy(network), latent=latent, latent_share=0.5)

    check(make, defender, trainer, tmp_path, [3, 9], max_epochs=3)


def test_poisoned_training_goes_on_within_an_epoch(network, trainer, tmp_path):
    def poisoned():
        return BackdoorDataModule(attack=WaNet(), batch_size=256, augment=RandomCropFlip(1))

    check(lambda: Classifier(copy.deepcopy(network)), poisoned, trainer, tmp_path, [3, 8], max_epochs=2)


def test_joint_training_goes_on_within_an_epoch(network, trainer, tmp_path):
    def poisoned():
        return BackdoorDataModule(attack=InputAware(width=8), train_on="untriggered", batch_size=256)

    def make():
        return InputAwareTraining(copy.deepcopy(network), mask_epochs=1)

    check(make, poisoned, trainer, tmp_path, [3, 8], max_epochs=2)


def test_accumulated_gradients_are_the_trainer_s_business(network, trainer, tmp_path):
    kwargs = {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    check(lambda: FineTuning(copy.deepcopy(network)), defender, trainer, tmp_path, [5, 10], **kwargs)


def test_anp_s_masks_are_in_range_in_every_checkpoint(network, trainer, tmp_path):
    assert fit(lambda: ANP(network, lr=50.0), defender, trainer, tmp_path, 3, max_epochs=2, every=1) is None
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
            seen.append(batch.labels.tolist())
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
    assert isinstance(loader, BatchLoader)
    loader.done = lambda: drawn.append(1) or 1
    iterator = iter(loader)
    assert drawn == []
    rest, every = list(iterator), list(loader)
    assert drawn == [1]  # only the first epoch can have been interrupted
    assert len(rest) == len(every) - 1
    assert all(torch.equal(a.images, b.images) and a.draw == b.draw for a, b in zip(rest, every[1:], strict=True))


def test_two_kills_at_random_moments_change_no_bit(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "resume.py"), "--points", "2", "--seed", "5"]
    ran = subprocess.run([*command, "--result", str(tmp_path / "r.json")], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    points = json.loads((tmp_path / "r.json").read_text())["points"]
    assert len(points) == 2
    assert all(point["same"] for point in points)
    assert max(max(point["resumed_from_steps"]) for point in points) > 0


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "code"])
def test_a_broken_checkpoint_is_named_with_the_newest_good_one(damage, network, clean_digits, trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True, filename="{epoch}")
    trainer(max_epochs=3, enable_checkpointing=True, callbacks=[saver]).fit(FineTuning(network), clean_digits)
    broken, newest = tmp_path / "last.ckpt", tmp_path / "epoch=2.ckpt"
    content = broken.read_bytes()
    broken.unlink()
    if damage == "code":
        torch.save({"state_dict": {}, "function": print}, broken)
    else:
        broken.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"x" * 999, "empty": b""}[damage])
    os.utime(newest)
    runner = trainer(max_epochs=4, plugins=[SafeCheckpointIO()])
    with pytest.raises(ValueError, match=r"last\.ckpt' is truncated or corrupt.*newest good one is .*epoch=2\.ckpt"):
        runner.fit(FineTuning(network), clean_digits, ckpt_path=broken)
    newest.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"newest good one is .*epoch=1\.ckpt"):
        runner.fit(FineTuning(network), clean_digits, ckpt_path=broken)
    for path in tmp_path.glob("epoch=*.ckpt"):
        path.unlink()
    with pytest.raises(ValueError, match="No other checkpoint lies beside it"):
        runner.fit(FineTuning(network), clean_digits, ckpt_path=broken)
    with pytest.raises(FileNotFoundError):
        runner.fit(FineTuning(network), clean_digits, ckpt_path=tmp_path / "none.ckpt")


def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path):
    """SLURM's part is played by environment variables, a signal and a `scontrol` that takes a note."""
    (tmp_path / "bin").mkdir()
    control = tmp_path / "bin" / "scontrol"
    control.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    control.chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "nba", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    env = os.environ | {f"SLURM_{key}": value for key, value in slurm.items()}
    env |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"}
    configs = ("data/digits", "attack/badnets", "defense/fine_tuning", "network/small_cnn_digits")
    command = [sys.executable, "-m", "nba_lightning", "fit"]
    command += [part for name in configs for part in ("--config", str(ROOT / "configs" / f"{name}.yaml"))]
    command += ["--data.batch_size", "8", "--trainer.max_epochs", "400", "--trainer.accelerator", "cpu"]
    command += ["--trainer.devices", "1", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    command += ["--trainer.default_root_dir", str(tmp_path), "--checkpoint.dirpath", str(tmp_path / "ckpt")]

    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for((tmp_path / "ckpt" / "last.ckpt").exists, first)
        first.send_signal(signal.SIGUSR1)
        wait_for((tmp_path / "requeued").exists, first)
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] > 0
    epochs = saved["epoch"] + 3
    second = subprocess.run(
        [*command, "--trainer.max_epochs", str(epochs)], env=env, capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stderr
    assert "hpc_ckpt_1.ckpt" in second.stderr + second.stdout
    last = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert last["epoch"] == epochs - 1
    assert last["global_step"] == epochs * 7  # 7 batches an epoch: none was trained on twice


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_trainer_that_brings_its_own_sampler_is_let(network, clean_digits, trainer):
    runner = trainer(max_epochs=2, overfit_batches=2)
    runner.fit(FineTuning(network), clean_digits)
    assert runner.global_step == 4
