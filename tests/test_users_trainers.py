"""Trainers, loaders and callbacks as users bring them: without a length, with workers, stopped early, run twice."""

import copy
import inspect

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nba_lightning import ANP, IBAU, NAD, NBA, SAU, Classifier, FinePruning, FineTuning
from nba_lightning.callbacks import CleanedWeights, PseudoSampleRegeneration
from nba_lightning.io.weights import save_weights
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import UniversalPerturbations
from tests.test_modules import DEFENSES, build, states_equal


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


def test_labels_need_epochs_of_a_known_length(network, trainer):
    module = NBA(network, teacher=copy.deepcopy(network), pseudo=crafting())
    with pytest.raises(ValueError, match="Expected `limit_train_batches` to be given where the loader has no length"):
        trainer(max_epochs=-1, max_steps=6).fit(module, DataLoader(Stream(), 16))


def test_a_fit_without_an_end_needs_a_schedule(network, trainer):
    loader = DataLoader(images(), 16)
    with pytest.raises(ValueError, match="the fit no last epoch"):
        trainer(max_epochs=-1, max_time={"seconds": 5}).fit(FineTuning(network), loader)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            assert pl_module.learns_labels
            trainer.should_stop = trainer.current_epoch == 2

    constant = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # noqa: E731
    module = NBA(network, teacher_epochs=1, scheduler=constant, pseudo=crafting())
    trainer(max_epochs=-1, callbacks=[Stop()]).fit(module, loader)
    assert module.cleaned


def test_a_loader_that_runs_dry_is_named(network, trainer):
    class Once(IterableDataset):
        left = 32

        def __iter__(self):
            while self.left:
                self.left -= 1
                yield torch.rand(1, 8, 8), 0

    module = NBA(network, teacher_epochs=1, pseudo=crafting())
    with pytest.raises(RuntimeError, match="yield batches again"):
        trainer(max_epochs=2, limit_train_batches=2).fit(module, DataLoader(Once(), 16))


@pytest.mark.parametrize(
    "make",
    [
        lambda network: NBA(network, teacher=copy.deepcopy(network), pseudo=crafting()),
        IBAU,
        FinePruning,
    ],
)
def test_persistent_workers_lose_no_step(make, network, trainer):
    count = Count()
    loader = DataLoader(images(), 16, num_workers=1, persistent_workers=True)
    trainer(max_epochs=2, callbacks=[count]).fit(make(network), loader)
    assert count.steps == {0: 4, 1: 4}


def test_steps_that_end_before_the_student_are_named(network, trainer):
    loader = DataLoader(images(), 16)
    for limits in ({"max_epochs": None}, {"max_epochs": 30}):
        with pytest.raises(ValueError, match="Expected `max_steps` to be above the 8 steps of the `teacher_epochs`"):
            trainer(max_steps=8, **limits).fit(NBA(network, teacher_epochs=2), loader)


def test_phases_are_those_of_the_steps_where_steps_end_the_fit(network, trainer):
    module = NBA(network, teacher_epochs=2, pseudo=crafting(), labelled=0.5)
    rates, labelled = [], []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            labelled.append(pl_module.learns_labels)

    trainer(max_epochs=100, max_steps=16, callbacks=[Watch()]).fit(module, DataLoader(images(), 16))
    assert rates[0] == pytest.approx(module.teacher_lr)
    assert rates[8] == pytest.approx(module.lr)
    assert 0 < rates[7] < 0.01
    assert labelled[8:] == [True] * 4 + [False] * 4


def test_a_fit_that_ends_with_the_teacher_writes_no_cleaned_weights(network, trainer, tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="No cleaned weights are written"):
        trainer(max_epochs=4, callbacks=[Stop()]).fit(NBA(network, teacher_epochs=2), DataLoader(images(), 16))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_fit_after_a_fast_dev_run_is_whole(network, trainer):
    before = copy.deepcopy(network.state_dict())
    module = NBA(network, teacher_epochs=1, pseudo=crafting())
    trainer(fast_dev_run=True).fit(module, DataLoader(images(), 16))
    assert not module.cleaned
    trainer(max_epochs=2).fit(module, DataLoader(images(), 16))
    assert module.cleaned
    assert not states_equal(before, module.teacher.state_dict())


def test_a_second_fit_keeps_the_teacher_and_goes_on_from_its_checkpoint(network, trainer, tmp_path):
    loader, module = DataLoader(images(), 16), NBA(network, teacher_epochs=2, pseudo=crafting())
    trainer(max_epochs=3).fit(module, loader)
    teacher = copy.deepcopy(module.teacher.state_dict())
    runner = trainer(max_epochs=1)
    runner.fit(module, loader)
    assert states_equal(teacher, module.teacher.state_dict())
    runner.save_checkpoint(tmp_path / "m.ckpt")
    again = NBA(SmallCNN(width=4, in_channels=1), teacher_epochs=2, pseudo=crafting())
    trainer(max_epochs=2).fit(again, loader, ckpt_path=tmp_path / "m.ckpt", weights_only=True)
    assert states_equal(teacher, again.teacher.state_dict())


def test_callbacks_of_the_user_win(network, trainer, tmp_path):
    path, regeneration = tmp_path / "mine" / "home.safetensors", PseudoSampleRegeneration(0)
    module = NBA(network, teacher_epochs=1, pseudo=crafting())
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
        module = NBA(copy.deepcopy(network), teacher_epochs=1, pseudo=crafting(), regenerate_every_n_epochs=every)
        runner.fit(module, DataLoader(images(), 16))
        found += [[c.every_n_epochs for c in runner.callbacks if isinstance(c, PseudoSampleRegeneration)]]
    assert found == [[1], [3]]


def test_a_checkpoint_loads_where_the_files_of_weights_are_gone(network, trainer, tmp_path):
    file = tmp_path / "w.safetensors"
    save_weights(network.state_dict(), file)
    module = NBA(network, weights=str(file), teacher_weights=str(file), pseudo=crafting())
    runner = trainer()
    runner.fit(module, DataLoader(images(), 16))
    runner.save_checkpoint(tmp_path / "m.ckpt")
    file.unlink()
    empty = SmallCNN(width=4, in_channels=1)
    again = NBA.load_from_checkpoint(tmp_path / "m.ckpt", model=empty, pseudo=crafting(), weights_only=True)
    assert states_equal(module.state_dict(), again.state_dict())
    assert again.teacher_epochs == 0


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
    assert NBA(network, labelled=1, distillation=0, alignment=0).suspicious is None
    assert NBA(network, labelled=0, mixed_distillation=0, distillation=4).suspicious is not None  # aligned with it
    assert NBA(network, labelled=1, alignment=0).suspicious is not None


def test_no_option_of_a_defence_is_one_that_it_cannot_have():
    for defense in (NAD, NBA):
        options = ArgumentParser()
        options.add_class_arguments(defense, "model")
        assert "--model.teacher_epochs" in options.format_help()
        assert "needs_teacher" not in options.format_help()
    assert "without momentum and weight decay" in inspect.getdoc(SAU)


def test_plain_training_takes_a_stream_too(network, trainer):
    count = Count()
    trainer(max_steps=5, max_epochs=-1, callbacks=[count]).fit(Classifier(network), DataLoader(Stream(), 16))
    assert sum(count.steps.values()) == 5
