"""Trainers, loaders and callbacks as users bring them: without a length, with workers, stopped early, run twice."""

import copy
import inspect
import pickle
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nba_lightning import ANP, IBAU, NAD, NBA, SAU, Classifier, FinePruning, FineTuning
from nba_lightning.behaviors import SampleSimilarity
from nba_lightning.callbacks import CleanedWeights, PseudoSampleRegeneration
from nba_lightning.defenses.nba import Terms
from nba_lightning.io.weights import save_weights
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import UniversalPerturbations
from tests.test_modules import DEFENSES, another, build, states_equal


class Stream(IterableDataset):
    """Images without a length."""

    def __init__(self, number=48):
        self.number = number

    def __iter__(self):
        for index in range(self.number):
            yield torch.rand(1, 8, 8), index % 10


class Count(pl.Callback):
    """Steps of each epoch."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps[trainer.current_epoch] = self.steps.get(trainer.current_epoch, 0) + 1


def images(number=64):
    return TensorDataset(torch.rand(number, 1, 8, 8), torch.arange(number) % 10)


def crafting():
    return UniversalPerturbations(rms=0.2, steps=3)


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_loader_without_a_length_needs_an_end_and_then_trains(defense, network, trainer):
    loader = DataLoader(Stream(), 16)
    with pytest.raises(ValueError, match="Expected `max_steps` to be given where the loader has no length"):
        trainer(max_epochs=2).fit(build(defense, copy.deepcopy(network)), loader)
    count = Count()
    trainer(max_epochs=2, limit_train_batches=3, callbacks=[count]).fit(build(defense, network), loader)
    assert count.steps == {0: 3, 1: 3}


def test_a_fit_without_an_end_needs_a_schedule(network, trainer):
    loader = DataLoader(images(), 16)
    with pytest.raises(ValueError, match="the fit no last epoch"):
        trainer(max_epochs=-1, max_time={"seconds": 5}).fit(FineTuning(network), loader)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    constant = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # noqa: E731
    module = NBA(network, teacher=another(network), scheduler=constant, pseudo=crafting())
    runner = trainer(max_epochs=-1, callbacks=[Stop()])
    runner.fit(module, loader)
    assert runner.current_epoch == 3


def test_a_loader_that_runs_dry_is_named(network, trainer):
    class Once(IterableDataset):
        left = 32

        def __iter__(self):
            while self.left:
                self.left -= 1
                yield torch.rand(1, 8, 8), 0

    module = NBA(network, teacher=another(network), pseudo=crafting())
    with pytest.raises(RuntimeError, match="yield batches again"):
        trainer(max_epochs=2, limit_train_batches=2).fit(module, DataLoader(Once(), 16))


@pytest.mark.parametrize(
    "make",
    [
        lambda network: NBA(network, teacher=another(network), pseudo=crafting()),
        IBAU,
        FinePruning,
    ],
)
def test_persistent_workers_lose_no_step(make, network, trainer):
    count = Count()
    loader = DataLoader(images(), 16, num_workers=1, persistent_workers=True)
    trainer(max_epochs=2, callbacks=[count]).fit(make(network), loader)
    assert count.steps == {0: 4, 1: 4}


@pytest.mark.parametrize("monitor", ["val/acc", None])
def test_the_best_checkpoint_and_early_stopping_are_the_student_s(monitor, network, trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor=monitor, mode="max", save_last=True)
    stopping = [] if monitor is None else [EarlyStopping("val/acc", mode="max", patience=50)]
    module = NBA(network, teacher=another(network), pseudo=crafting())
    runner = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[saver, *stopping], limit_val_batches=1)
    runner.fit(module, DataLoader(images(), 16), DataLoader(images(), 16))
    for path in (saver.best_model_path, saver.last_model_path):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert {name for name in state if name.startswith("model.")} == {f"model.{n}" for n in network.state_dict()}
        assert not any("teacher" in name or "suspicious" in name for name in state)


def test_swa_averages_students_alone(network, trainer):
    module = NBA(network, teacher=another(network), pseudo=crafting(), lr=1e-6)
    before = copy.deepcopy(network.state_dict())
    swa = StochasticWeightAveraging(swa_lrs=1e-6, swa_epoch_start=1)
    trainer(max_epochs=4, callbacks=[swa]).fit(module, DataLoader(images(), 16))
    for name, value in module.model.named_parameters():
        torch.testing.assert_close(value, before[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize("defense", DEFENSES)
def test_weight_averaging_copies_a_module_at_the_start_and_works_to_the_end(defense, network, trainer):
    averaging = EMAWeightAveraging(decay=0.5)
    trainer(max_epochs=2, callbacks=[averaging]).fit(build(defense, network), DataLoader(images(), 16))
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


@pytest.mark.parametrize("defense", DEFENSES)
def test_every_defence_can_be_pickled_and_copied(defense, network):
    module = build(defense, network)
    again = pickle.loads(pickle.dumps(module))
    assert states_equal(module.state_dict(), again.state_dict())
    assert again.configure_callbacks()


def test_a_fit_that_time_ended_is_not_called_cleaned(network, trainer, tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    runner = trainer(max_epochs=4, callbacks=[Stop()])
    runner.fit_loop.min_epochs = 0
    with pytest.warns(UserWarning, match="ended at step 4, before its last one"):
        runner.fit(FineTuning(network), DataLoader(images(), 16))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["unfinished.safetensors"]


def test_a_second_fit_replaces_no_cleaned_weights(network, trainer, tmp_path):
    loader = DataLoader(images(), 16)
    trainer().fit(FineTuning(network), loader)
    first = load_file(tmp_path / "cleaned.safetensors")
    trainer().fit(FineTuning(network), loader)
    assert states_equal(load_file(tmp_path / "cleaned.safetensors"), first)
    assert states_equal(load_file(tmp_path / "cleaned-v1.safetensors"), network.state_dict())


def test_a_fit_goes_on_with_the_parts_that_it_began_with(network, trainer, tmp_path):
    loader = DataLoader(images(), 16)

    def module(teacher, **kwargs):
        return NBA(copy.deepcopy(network), teacher=teacher, **({"pseudo": crafting()} | kwargs))

    teacher = another(network)
    runner = trainer(max_epochs=1)
    runner.fit(module(teacher), loader)
    runner.save_checkpoint(tmp_path / "m.ckpt")
    fit = {"ckpt_path": tmp_path / "m.ckpt", "weights_only": True}
    trainer(max_epochs=2).fit(module(teacher), loader, **fit)
    for other in (
        {"teacher": another(teacher)},
        {"teacher": teacher, "behavior": SampleSimilarity()},
        {"teacher": teacher, "optimizer": partial(torch.optim.AdamW, lr=1e-4)},
    ):
        with pytest.raises(ValueError, match="Expected the same parts as in the checkpoint"):
            trainer(max_epochs=2).fit(module(**other), loader, **fit)
    with pytest.warns(UserWarning, match="other parts.*`pseudo` was UniversalPerturbations"):
        NBA.load_from_checkpoint(tmp_path / "m.ckpt", model=copy.deepcopy(network), weights_only=True)


def test_hyperparameters_reach_the_logger_s_file(network, trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(logger=logger).fit(NBA(network, teacher=another(network), lr=0.003), DataLoader(images(), 16))
    kept = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert kept["lr"] == 0.003
    assert kept["pseudo_share"] == 0.5


def test_a_checkpoint_is_two_networks_large(trainer, tmp_path):
    network = SmallCNN(width=32, in_channels=1)
    size = sum(value.numel() for value in network.state_dict().values()) * 4
    runner = trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    runner.fit(NBA(network, teacher=another(network), pseudo=crafting()), DataLoader(images(), 16))
    assert (tmp_path / "last.ckpt").stat().st_size < 2.2 * size  # weights and momentum


def test_callbacks_of_the_user_win(network, trainer, tmp_path):
    path, regeneration = tmp_path / "mine" / "home.safetensors", PseudoSampleRegeneration(0)
    module = NBA(network, teacher=another(network), pseudo=crafting())
    runner = trainer(max_epochs=2, callbacks=[CleanedWeights(str(path)), regeneration])
    runner.fit(module, DataLoader(images(), 16))
    assert states_equal(load_file(path), module.model.state_dict())
    assert [one for one in runner.callbacks if isinstance(one, PseudoSampleRegeneration)] == [regeneration]
    assert sum(isinstance(one, CleanedWeights) for one in runner.callbacks) == 1


def test_callbacks_of_the_module_are_fresh_in_every_fit(network, trainer):
    runner = trainer(max_epochs=2)
    found = []
    for every in (1, 3):
        runner.fit_loop.epoch_progress.reset()
        module = NBA(
            copy.deepcopy(network), teacher=another(network), pseudo=crafting(), regenerate_every_n_epochs=every
        )
        runner.fit(module, DataLoader(images(), 16))
        found += [[c.every_n_epochs for c in runner.callbacks if isinstance(c, PseudoSampleRegeneration)]]
    assert found == [[1], [3]]


def test_a_checkpoint_loads_where_the_files_of_weights_are_gone(network, trainer, tmp_path):
    file, other = tmp_path / "w.safetensors", tmp_path / "t.safetensors"
    save_weights(network.state_dict(), file)
    save_weights(another(network).state_dict(), other)
    module = NBA(network, weights=str(file), teacher_weights=str(other), pseudo=crafting())
    runner = trainer()
    runner.fit(module, DataLoader(images(), 16))
    runner.save_checkpoint(tmp_path / "m.ckpt")
    file.unlink()
    other.unlink()
    empty = SmallCNN(width=4, in_channels=1)
    again = NBA.load_from_checkpoint(tmp_path / "m.ckpt", model=empty, pseudo=crafting(), weights_only=True)
    assert states_equal(module.state_dict(), again.state_dict())


def test_validation_sees_what_anp_would_prune_now(network, trainer):
    module = ANP(network, threshold=0.5)
    batch = torch.rand(16, 1, 8, 8)
    module.eval()
    assert torch.equal(module(batch), network(batch))
    with torch.no_grad():
        module.masks[1][:2] = 0.1
    shown = module(batch)
    assert not torch.allclose(shown, network(batch))
    module.prune()
    torch.testing.assert_close(shown, network(batch))


def test_a_network_that_nothing_asks_is_not_kept(network):
    assert NBA(network, terms=Terms(teacher=1.0)).suspicious is None
    assert NBA(network, terms=Terms(suspicious=1.0)).suspicious is not None


def test_no_option_of_a_defence_is_one_that_it_cannot_have():
    for defense in (NAD, NBA):
        options = ArgumentParser()
        options.add_class_arguments(defense, "model")
        assert "--model.teacher_weights" in options.format_help()
        assert "teacher_epochs" not in options.format_help()
    assert "without momentum and weight decay" in inspect.getdoc(SAU)


def test_plain_training_takes_a_stream_too(network, trainer):
    count = Count()
    trainer(max_steps=5, max_epochs=-1, callbacks=[count]).fit(Classifier(network), DataLoader(Stream(), 16))
    assert sum(count.steps.values()) == 5
