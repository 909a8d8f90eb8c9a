import contextlib
import copy
import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import ANP, BTIDBF, NAD, NBA, RNP, BackdoorDataModule, Classifier, Defense, FineTuning, Unlearning
from nba_lightning.attacks import BadNets, Blended
from nba_lightning.behaviors import FSP
from nba_lightning.callbacks import NonFiniteLossError
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.modes import frozen_statistics
from nba_lightning.defenses.nba import Terms
from nba_lightning.io.adapters import check_fit
from nba_lightning.io.weights import save_weights
from nba_lightning.networks import Normalize, SmallCNN
from nba_lightning.pseudo import (
    ClassPerturbations,
    SamplePerturbations,
    Together,
    TriggerFamilies,
    UniversalPerturbations,
)
from nba_lightning.training.distillation import Distillation
from nba_lightning.training.schedule import cosine_factor


def below(cls):
    return [found for child in cls.__subclasses__() for found in (child, *below(child))]


DEFENSES = [cls for cls in below(Defense) if cls.__module__.startswith("nba_lightning.defenses")]


def build(defense, network, **kwargs):
    if issubclass(defense, Distillation):
        kwargs = {"teacher": another(network)} | kwargs
    if defense is ANP:
        kwargs = {"threshold": 1.0} | kwargs  # a short fit moves masks a little only
    if defense is RNP:
        kwargs = {"lr": 50.0, "max_drop": 1.0} | kwargs  # likewise
    if defense is BTIDBF:  # two rounds in a short fit
        kwargs = {"round_epochs": 2, "mask_epochs": 1, "generator_epochs": 1, "generator_width": 4} | kwargs
    if defense is NBA:
        kwargs = {"pseudo": UniversalPerturbations(2, rms=0.2, steps=2)} | kwargs
    if defense is Unlearning:
        kwargs = {"classes": [0]} | kwargs
    return defense(network, **kwargs)


def another(network):
    """A teacher: a network of the same kind with other weights."""
    torch.manual_seed(5)
    teacher = copy.deepcopy(network)
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return teacher


def states_equal(first, second):
    def equal(one, other):
        return states_equal(one, other) if isinstance(one, dict) else torch.equal(one, other)

    return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())


def test_schedule_at_closed_values():
    assert cosine_factor(0, 10) == 1.0
    assert cosine_factor(5, 10) == pytest.approx(0.5)
    assert cosine_factor(10, 10) == 0.0
    assert cosine_factor(1, 10, warmup=0.2) == pytest.approx(2 / 3)
    assert cosine_factor(6, 10, warmup=0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize("defense", DEFENSES)
def test_every_defense_changes_the_network_and_leaves_its_keys_and_dtypes(
    defense, network, clean_digits, trainer, tmp_path
):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = build(defense, network)
    trainer(max_epochs=2).fit(module, clean_digits)
    cleaned = load_file(tmp_path / "cleaned.safetensors")
    assert {name: value.dtype for name, value in cleaned.items()} == {n: v.dtype for n, v in before.items()}
    assert not states_equal(cleaned, before)
    assert states_equal(cleaned, module.model.state_dict())


@pytest.mark.parametrize("defense", DEFENSES)
def test_resumed_equals_uninterrupted(defense, network, trainer, tmp_path):
    def run(epochs, folder, ckpt_path=None, total=4):
        data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=16, augment=RandomCropFlip(1))
        module = build(defense, copy.deepcopy(network))
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_epochs=1)

        class Stop(pl.Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == epochs:
                    raise KeyboardInterrupt

        runner = trainer(max_epochs=total, enable_checkpointing=True, callbacks=[saver, Stop()])
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            runner.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = run(99, "whole")
    for stop in (1, 2, 3):
        run(stop, f"part{stop}")
        resumed = run(99, f"part{stop}", ckpt_path=tmp_path / f"part{stop}" / "last.ckpt")
        assert states_equal(whole.state_dict(), resumed.state_dict()), f"stopped before epoch {stop}"


@pytest.mark.parametrize("defense", [Classifier, *DEFENSES])
def test_checkpoints_hold_no_code_and_load_again(defense, network, clean_digits, trainer, tmp_path):
    module = build(defense, copy.deepcopy(network))
    runner = trainer(max_epochs=2, enable_checkpointing=True)
    runner.fit(module, clean_digits)
    runner.save_checkpoint(tmp_path / "m.ckpt")
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    json.dumps(dict(content["hyper_parameters"]))
    again = defense.load_from_checkpoint(tmp_path / "m.ckpt", model=network, weights_only=True)
    assert again.lr == module.lr
    assert states_equal(module.model.state_dict(), again.model.state_dict())


def test_a_backdoor_is_implanted_and_the_figures_are_right(trainer):
    data = BackdoorDataModule(attack=Blended(alpha=0.4), batch_size=64)
    module = Classifier(SmallCNN(width=8, in_channels=1))
    trainer(max_epochs=8).fit(module, data)
    clean, triggered = trainer().test(module, data, verbose=False)
    assert clean["test/acc"] > 0.9
    assert triggered["test/asr"] > 0.9
    module.eval()
    images, labels, targets = data.on_after_batch_transfer(next(iter(data.test_dataloader()[1])), 1)
    answers = module(images).argmax(1)
    assert triggered["test/asr"] == pytest.approx(float((answers == targets).float().mean()))
    assert triggered["test/ra"] == pytest.approx(float((answers == labels).float().mean()))


class Counting(nn.Module):
    """A network that counts its forward passes."""

    feature_layers = ("net.block1", "net.block2")

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, images):
        self.calls += 1
        return self.net(images)


@pytest.mark.parametrize("defense", [NAD, NBA])
def test_a_missing_teacher_is_named_with_what_to_type(defense, network, clean_digits, trainer, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)Expected `teacher` to be given for (NBA|NAD).*FineTuning\(copy"):
        trainer().fit(defense(network), clean_digits)
    trainer().test(defense(network), clean_digits, verbose=False)  # needs none
    with pytest.raises(ValueError, match="Expected `teacher` to be another network than the student"):
        trainer().fit(defense(network, teacher=copy.deepcopy(network)), clean_digits)
    save_weights(another(network).state_dict(), tmp_path / "t.safetensors")
    module = defense(network, teacher_weights=str(tmp_path / "t.safetensors"))
    assert states_equal(module.teacher.network.state_dict(), another(network).state_dict())
    with pytest.raises(ValueError, match="Expected `teacher_weights` to be left out"):
        defense(network, teacher=another(network), teacher_weights=str(tmp_path / "t.safetensors"))


def test_a_defence_is_a_teacher_too(network, clean_digits, trainer):
    tuned = FineTuning(copy.deepcopy(network))
    trainer().fit(tuned, clean_digits)
    assert states_equal(NBA(network, teacher=tuned).teacher.network.state_dict(), tuned.model.state_dict())


def test_pseudo_samples_leave_batchnorm_statistics_alone(network):
    network.train()
    before = copy.deepcopy(network.state_dict())
    with frozen_statistics(network):
        network(torch.rand(4, 1, 8, 8))
    assert states_equal(before, network.state_dict())
    network(torch.rand(4, 1, 8, 8))
    assert not states_equal(before, network.state_dict())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"behavior": FSP()},
        {"pseudo": SamplePerturbations(steps=2)},
        {"pseudo": TriggerFamilies(candidates=2, kept=1)},
        {"pseudo": Together([TriggerFamilies(candidates=0, kept=0), ClassPerturbations(steps=1)], [2, 1])},
        {"terms": Terms(cross_entropy=1.0, teacher=1.0), "mixed_share": 0.5},
        {"layers": ["fc"]},
        {"optimizer": torch.optim.AdamW},
    ],
)
def test_variants_train(kwargs, network, clean_digits, trainer):
    module = build(NBA, network, **kwargs)
    before = network.fc.weight.clone()
    trainer(max_epochs=2).fit(module, clean_digits)
    assert torch.isfinite(module.model.fc.weight).all()
    assert not torch.equal(before, module.model.fc.weight)


def test_any_loader_of_images_and_labels_will_do(trainer):
    loader = DataLoader(TensorDataset(torch.rand(32, 3, 16, 16), torch.randint(0, 4, (32,))), 16)
    theirs = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    module = NBA(theirs, teacher=another(theirs), layers=["2"])
    trainer(max_epochs=2).fit(module, loader)
    assert [len(draws["field"]) for draws in module.pseudo.found if "field" in draws] == [2, 2, 2]


def test_networks_that_do_not_fit_the_data_are_named(clean_digits, trainer):
    with pytest.raises(ValueError, match=r"Expected `model` to be a network that takes images of shape \(1, 8, 8\)"):
        trainer().fit(Classifier(SmallCNN(in_channels=3)), clean_digits)
    with pytest.raises(ValueError, match="one logit for each of the data's 10 classes"):
        trainer().fit(Classifier(SmallCNN(in_channels=1, num_classes=7)), clean_digits)
    network = SmallCNN().train()
    check_fit(network, (3, 32, 32), 10)
    assert network.training
    assert network.block1[1].num_batches_tracked == 0


def test_images_outside_the_unit_range_are_named(network, trainer):
    loader = DataLoader(TensorDataset(2 * torch.rand(8, 1, 8, 8), torch.zeros(8).long()), 8)
    with pytest.raises(
        ValueError, match=r"Expected `images` to hold values in \[0, 1\], but got values from 0.* to 1.9"
    ):
        trainer().fit(Classifier(network), loader)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(network, clean_digits, trainer, tmp_path):
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 2:
                pl_module.model.fc.weight.data.fill_(float("nan"))

    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_top_k=-1)
    runner = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[saver, Poison()])
    with pytest.raises(
        NonFiniteLossError, match=rf"from step 5 on. The last good checkpoint is '{tmp_path}/last.ckpt'"
    ):
        runner.fit(Classifier(network), clean_digits)
    for path in tmp_path.glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_suspicious_weights_come_in_by_one_argument(network, tmp_path):
    save_weights({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "w.safetensors")
    module = NBA(SmallCNN(width=4, in_channels=1), weights=str(tmp_path / "w.safetensors"))
    assert states_equal(network.state_dict(), module.model.state_dict())
    assert states_equal(network.state_dict(), module.suspicious.network.state_dict())


def test_normalize_by_hand():
    layer = Normalize([0.1, 0.2, 0.3], [0.5, 1.0, 2.0])
    torch.testing.assert_close(layer(torch.ones(1, 3, 1, 1)).flatten(), torch.tensor([1.8, 0.8, 0.35]))
    with pytest.raises(ValueError, match="Expected `mean` to be one value or 3 values"):
        Normalize([0.1, 0.2])
    with pytest.raises(ValueError, match="Expected `std` to be positive"):
        Normalize(std=0.0)
