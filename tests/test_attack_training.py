"""Attacks that train something beside the classifier, and states that travel."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from nba_lightning import BackdoorDataModule, Classifier, FineTuning, InputAwareTraining, Steganography
from nba_lightning.app.figures import gallery_figure
from nba_lightning.attacks import LF, SSBA, BadNets, Blended, InputAware
from nba_lightning.implants.input_aware import diversity_loss
from nba_lightning.io.weights import save_weights
from nba_lightning.networks import SmallCNN


def digits(attack, **kwargs):
    return BackdoorDataModule(attack=attack, **({"batch_size": 64} | kwargs))


@pytest.fixture
def small():
    return SmallCNN(width=8, in_channels=1)


def test_input_aware_implants_and_its_trigger_comes_back_from_the_checkpoint(small, trainer, tmp_path):
    data = digits(InputAware(width=8, target=3, poison_rate=0.25, cross_ratio=0.2), train_on="untriggered")
    module = InputAwareTraining(small, mask_epochs=2, mask_density=0.1)
    runner = trainer(max_epochs=16, enable_checkpointing=True)
    runner.fit(module, data)
    runner.save_checkpoint(tmp_path / "implant.ckpt")
    clean, triggered = trainer().test(module, data, verbose=False)
    assert clean["test/acc"] > 0.8
    assert triggered["test/asr"] > 0.3  # about 0.1 without training; 0.56 to 0.95 over seeds
    again = digits(
        InputAware(width=8, target=3, poison_rate=0.25, state=str(tmp_path / "implant.ckpt")),
        train_on="clean",
        batch_size=16,
    )
    again.setup("test")
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.attack(images), data.attack(images))
        assert not torch.equal(again.attack(images)[:1] - images[:1], again.attack(images)[1:2] - images[1:2])
    defense = FineTuning(copy.deepcopy(module.model))
    trainer().fit(defense, again)
    figures = trainer().test(Classifier(copy.deepcopy(small)), again, verbose=False)
    assert figures[1]["test/asr"] == pytest.approx(triggered["test/asr"])


def test_masks_are_trained_before_the_classifier(small, trainer):
    before = copy.deepcopy(small.state_dict())
    module = InputAwareTraining(small, mask_epochs=1)
    masks = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            masks.append(copy.deepcopy(pl_module.attack.mask_network.state_dict()))

        def on_train_epoch_end(self, trainer, pl_module):
            masks.append(copy.deepcopy(pl_module.attack.mask_network.state_dict()))
            if trainer.current_epoch == 0:
                assert all(torch.equal(value, before[name]) for name, value in pl_module.model.state_dict().items())

    trainer(max_epochs=2, callbacks=[Look()]).fit(module, digits(InputAware(width=8), train_on="untriggered"))
    start, first, second = (state["last.weight"] for state in masks)
    assert not torch.equal(start, first)
    assert torch.equal(first, second)


def test_input_aware_training_resumed_equals_uninterrupted(small, trainer, tmp_path):
    def run(stop, ckpt_path=None):
        torch.manual_seed(5)
        module, saver = (
            InputAwareTraining(copy.deepcopy(small), mask_epochs=1),
            ModelCheckpoint(tmp_path, save_last=True),
        )

        class Stop(pl.Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                trainer.should_stop = trainer.current_epoch >= stop

        runner = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[saver, Stop()])
        runner.fit(module, digits(InputAware(width=8), train_on="untriggered"), ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole = run(9)
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    run(1)
    resumed = run(9, tmp_path / "last.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_diversity_loss_by_hand():
    first, second = torch.full((1, 1, 2, 2), 0.9), torch.full((1, 1, 2, 2), 0.3)
    out_first, out_second = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.2)
    assert diversity_loss(first, second, out_first, out_second).item() == pytest.approx(2.0, rel=1e-5)
    same = torch.zeros(1, 1, 2, 2, requires_grad=True)
    diversity_loss(first, second, same, same.detach()).backward()
    assert torch.isfinite(same.grad).all()  # two equal patterns must not give a gradient of nan


def test_the_encoder_learns_to_hide_a_string_and_travels(trainer, tmp_path):
    data = digits(SSBA(secret="ab", width=8), train_on="untriggered", batch_size=32)
    module = Steganography(image_weight=5.0)
    runner = trainer(max_epochs=15, enable_checkpointing=True, limit_val_batches=1.0)
    runner.fit(module, data)
    assert runner.callback_metrics["val/bit_accuracy"] > 0.8
    assert runner.callback_metrics["val/psnr"] > 15
    runner.save_checkpoint(tmp_path / "encoder.ckpt")
    again = digits(SSBA(secret="ab", width=8, state=str(tmp_path / "encoder.ckpt")))
    again.setup("fit")
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.attack(images), data.attack(images))


def test_the_wrong_attack_or_too_few_epochs_are_named(small, trainer):
    with pytest.raises(
        ValueError, match="Expected `attack` to be an InputAware for InputAwareTraining, but got BadNets"
    ):
        trainer().fit(InputAwareTraining(small), digits(BadNets()))
    with pytest.raises(ValueError, match="Expected `attack` to be an SSBA for Steganography, but got BadNets"):
        trainer().fit(Steganography(), digits(BadNets()))
    with pytest.raises(ValueError, match="Expected `max_epochs` to be above the 2 `mask_epochs`, but got 1"):
        trainer(max_epochs=1).fit(InputAwareTraining(small), digits(InputAware(width=8), train_on="untriggered"))
    with pytest.raises(ValueError, match="fit nba_lightning.implants.InputAwareTraining"):
        trainer().fit(Classifier(small), digits(InputAware(width=8)))


def test_a_computed_trigger_travels_in_the_defence_s_checkpoint(small, trainer, tmp_path):
    surrogate = SmallCNN(width=4, in_channels=1)
    data = digits(LF(surrogate, amplitude=0.3, steps=5))
    runner = trainer(enable_checkpointing=True)
    runner.fit(Classifier(small), data)
    runner.save_checkpoint(tmp_path / "implant.ckpt")
    later = digits(LF(amplitude=0.3, steps=5), train_on="clean", batch_size=16)
    trainer().test(Classifier(small), later, ckpt_path=tmp_path / "implant.ckpt", verbose=False, weights_only=True)
    assert torch.equal(later.attack.pattern, data.attack.pattern)


def test_a_file_without_an_attack_is_named(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match="to hold an attack, as checkpoints of a training on poisoned images do"):
        BadNets(state=str(tmp_path / "m.ckpt")).prepare((1, 8, 8), 10)


def test_the_gallery_shows_what_each_trigger_changed(tmp_path):
    clean = torch.full((3, 8, 8), 0.5)
    triggered = {f"attack {index}": clean.clone() for index in range(8)}
    triggered["attack 0"][:, 0, 0] = 1.0
    gallery_figure(clean, triggered, tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.size[0] > 1500
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_checkpoint_of_another_attack_is_left_alone_with_a_warning(small, trainer, tmp_path):
    runner = trainer(enable_checkpointing=True)
    runner.fit(Classifier(small), digits(BadNets()))
    runner.save_checkpoint(tmp_path / "m.ckpt")
    other = digits(Blended(), train_on="clean", batch_size=16)
    with pytest.warns(UserWarning, match="was made under BadNets; Blended starts afresh"):
        trainer().test(Classifier(small), other, ckpt_path=tmp_path / "m.ckpt", verbose=False, weights_only=True)


def test_a_checkpoint_of_the_same_attack_with_other_arguments_is_refused():
    saved = digits(BadNets(pattern="white", poison_rate=0.3)).state_dict()
    digits(BadNets(pattern="white", poison_rate=0.1)).load_state_dict(saved)
    with pytest.raises(ValueError, match="pattern='white' instead of 'checkerboard'"):
        digits(BadNets()).load_state_dict(saved)


def test_a_named_state_wins_over_a_checkpoint_in_a_test(small, trainer, tmp_path):
    named = Blended(pattern_seed=1)
    named.prepare((1, 8, 8), 10)
    save_weights(named.state_dict(), tmp_path / "named.safetensors")
    runner = trainer(enable_checkpointing=True)
    runner.fit(Classifier(small), digits(Blended()))
    runner.save_checkpoint(tmp_path / "m.ckpt")
    data = digits(Blended(state=str(tmp_path / "named.safetensors")))
    trainer().test(Classifier(small), data, ckpt_path=tmp_path / "m.ckpt", verbose=False, weights_only=True)
    assert torch.equal(data.attack.blend, named.blend)


def test_an_untrained_generator_is_not_tested(small, trainer):
    with pytest.raises(ValueError, match="fit nba_lightning.implants.InputAwareTraining"):
        trainer().test(InputAwareTraining(small), digits(InputAware(width=8), train_on="untriggered"), verbose=False)


def test_a_tested_encoder_can_still_poison_and_gets_no_gradient(small, trainer):
    data = digits(SSBA(width=8), train_on="untriggered")
    data.setup()
    data.attack.ready = True
    trainer().test(Classifier(small), data, verbose=False)
    trainer(max_steps=2).fit(Classifier(small), data)
    assert all(parameter.grad is None for parameter in data.attack.parameters())


def test_the_generators_are_in_the_checkpoint_once(small, trainer, tmp_path):
    runner = trainer(max_epochs=2, enable_checkpointing=True)
    runner.fit(InputAwareTraining(small, mask_epochs=1), digits(InputAware(width=8), train_on="untriggered"))
    runner.save_checkpoint(tmp_path / "m.ckpt")
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert not any(name.startswith("attack.") for name in content["state_dict"])
    assert any(name.startswith("pattern_network") for name in content["BackdoorDataModule"]["attack"])
    trainer().test(
        Classifier(small),
        digits(InputAware(width=8), train_on="untriggered"),
        ckpt_path=tmp_path / "m.ckpt",
        verbose=False,
        weights_only=True,
    )


def test_a_schedule_of_one_s_own_is_used(small, trainer):
    module = InputAwareTraining(small, mask_epochs=1, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    trainer(max_epochs=3).fit(module, digits(InputAware(width=8), train_on="untriggered"))
    assert module.optimizers()[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


def test_the_patterns_come_to_rest_with_the_classifier(small, trainer):
    module, seen = InputAwareTraining(small, mask_epochs=1, warmup=0.0), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append([optimizer.param_groups[0]["lr"] for optimizer in pl_module.optimizers()])

    trainer(max_epochs=3, callbacks=[Look()]).fit(module, digits(InputAware(width=8), train_on="untriggered"))
    classifier, pattern, mask = (torch.tensor(rates) for rates in zip(*seen, strict=True))
    third = len(seen) // 3
    assert pattern[: third - 1].eq(0.01).all()  # the masks' epoch
    assert torch.allclose(pattern / 0.01, classifier / 0.1)
    assert pattern[-1] < 1e-6
    assert mask.eq(0.01).all()


def test_mask_diversity_is_in_units_of_the_images_spread(small, trainer):
    """Images of half the contrast ask for the same masks."""
    module, data = (
        InputAwareTraining(small, mask_epochs=1, lambda_norm=0.0),
        digits(InputAware(width=8), train_on="untriggered"),
    )
    trainer(max_steps=1, max_epochs=2).fit(module, data)
    images = torch.rand(8, 1, 8, 8)
    masks = torch.rand(8, 1, 8, 8)
    module.attack.mask = lambda _: masks
    whole, faint = module._mask_loss(images), module._mask_loss(0.5 * images)
    assert whole.item() == pytest.approx(faint.item(), rel=1e-4)
