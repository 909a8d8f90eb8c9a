"""NBA: what it crafts its pseudo samples with, its loss, and what it keeps of the suspicious network."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import nn

from nba_lightning import NBA, Classifier, FineTuning
from nba_lightning.attacks import Blended
from nba_lightning.behaviors import FSP
from nba_lightning.callbacks import PseudoSampleRegeneration
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.features import features
from nba_lightning.core.functional import channel_gram
from nba_lightning.data import BackdoorDataModule
from nba_lightning.defenses.nba import Terms
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import PseudoSamples, TriggerFamilies, UniversalPerturbations
from tests.helpers import Spy, batch, cross_entropy, drifted, lively, ready, small


class Note(PseudoSamples):
    """Crafts nothing and notes what it is called with."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift, self.crafted, self.asked = shift, [], []

    def regenerate(self, student, teacher, batches, generator=None, reduce=None):
        images = [next(iter(batches)).clone() for _ in range(3)]
        self.crafted.append((student, teacher, images, torch.rand(4, generator=generator), reduce))

    def forward(self, images, student=None, teacher=None, generator=None):
        self.asked.append((images.clone(), student, teacher, torch.rand(4, generator=generator)))
        return torch.full_like(images, self.shift)


def test_crafting_gets_student_and_teacher_other_batches_and_a_draw_for_each_epoch(network, trainer, clean_digits):
    note = Note()
    module = NBA(network, teacher=small(), pseudo=note)
    trainer(max_epochs=2).fit(module, clean_digits)
    assert len(note.crafted) == 2  # once an epoch
    for student, teacher, images, _, reduce in note.crafted:
        assert student is module.model
        assert teacher is module.teacher.network
        assert reduce == module.reduce
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[1], images[2])
        assert all(0.0 <= float(one.min()) <= float(one.max()) <= 1.0 for one in images)
    assert not torch.equal(note.crafted[0][3], note.crafted[1][3])
    assert all(student is module.model and teacher is module.teacher.network for _, student, teacher, _ in note.asked)
    draws = [draw for *_, draw in note.asked]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)  # no step has another's draw


def test_pseudo_samples_are_the_first_share_of_a_batch_and_within_the_range_of_images(network, trainer):
    module = ready(NBA(network, teacher=small(), pseudo=Note(0.4), pseudo_share=0.5), trainer)
    images, _ = batch(8)
    found = module._perturbed(images, torch.Generator())
    torch.testing.assert_close(found, torch.cat([(images[:4] + 0.4).clip(max=1.0), images[4:]]))
    module.pseudo.shift = -0.4
    assert float(module._perturbed(images, torch.Generator()).min()) == 0.0
    assert all(torch.equal(given, images[:4]) for given, *_ in module.pseudo.asked)


def test_crafting_runs_in_eval_mode_within_a_fit_and_changes_no_statistics(network, trainer, clean_digits):
    module = NBA(Spy(lively(network)), teacher=Spy(small()), pseudo=UniversalPerturbations(2, rms=0.9, steps=4))
    student, teacher, seen = module.model, module.teacher.network, []
    regenerate = module.pseudo.regenerate

    def look(*args):
        before, modes = copy.deepcopy(network.state_dict()), [layer.training for layer in network.modules()]
        first = len(student.modes), len(teacher.modes)
        regenerate(*args)
        seen.append((student.modes[first[0] :], teacher.modes[first[1] :]))
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert [layer.training for layer in network.modules()] == modes == [True] * len(modes)
        for mine, theirs in zip(student.images[first[0] :], teacher.images[first[1] :], strict=True):
            assert torch.equal(mine, theirs)
            assert 0.0 <= float(mine.min()) <= float(mine.max()) <= 1.0

    module.pseudo.regenerate = look
    trainer().fit(module, clean_digits)
    assert seen == [([{False}] * 4, [{False}] * 4)]


@pytest.mark.parametrize("mixed", [0, 4, 6])
def test_the_loss_is_the_equation(mixed, network, trainer):
    weights = Terms(cross_entropy=2.0 * (mixed < 6), teacher=3.0, suspicious=4.0, alignment=5.0)
    teacher, shift = lively(small()), 0.1 * torch.rand(1, 1, 8, 8)
    module = ready(NBA(lively(network), teacher=teacher, pseudo=Note(), terms=weights, mixed_share=mixed / 6), trainer)
    suspicious = copy.deepcopy(network).eval()
    module.pseudo.forward = lambda images, *args: shift.expand_as(images)
    module.model.load_state_dict(drifted(network).state_dict())  # a student on its way
    module.mixing.forward = lambda images, generator: images.flip(3)
    module.eval()
    given, labels = batch(6)
    loss = module.training_step((given, labels), 1)
    images = torch.cat([given[: 6 - mixed], given[6 - mixed :].flip(3)])
    inputs = torch.cat([(images[:3] + shift).clip(0, 1), images[3:]])
    names = ["block1", "block2", "block3"]
    logits, observed = features(module.model, inputs, names)
    benign, wanted = features(teacher.eval(), images, names)
    known = suspicious(images)
    expected = 0.0 if mixed == 6 else 2 * cross_entropy(logits[: 6 - mixed], labels[: 6 - mixed])
    for weight, answers in ((3, benign), (4, known)):  # KL(answers || student), image by image
        for p, q in zip(answers.softmax(1), logits.softmax(1), strict=True):
            expected = expected + weight * (p * (p / q).log()).sum() / 6
    apart = [(channel_gram(observed[n]) - channel_gram(wanted[n])).square().sum(dim=1).mean() for n in names]
    torch.testing.assert_close(loss, expected + 5 * sum(apart) / 3)


@pytest.mark.parametrize(
    ("options", "teacher", "suspicious"),
    [
        ({}, 1, 1),
        ({"terms": Terms(suspicious=1.0)}, 0, 1),
        ({"terms": Terms(teacher=1.0)}, 1, 0),
        ({"terms": Terms(cross_entropy=1.0), "mixed_share": 0.5}, 0, 0),
        ({"pseudo_share": 0.0}, 1, 1),
    ],
)
def test_a_term_that_is_off_costs_no_pass(options, teacher, suspicious, network, trainer):
    module = ready(NBA(Spy(network), teacher=Spy(small()), pseudo=Note(), **options), trainer)
    module.training_step(batch(), 1)
    assert len(module.model.images) == 1
    assert len(module.teacher.network.images) == teacher
    assert (0 if module.suspicious is None else len(module.suspicious.network.images)) == suspicious
    regenerates = any(isinstance(one, PseudoSampleRegeneration) for one in module.configure_callbacks())
    assert regenerates is (options.get("pseudo_share") != 0)


def test_a_fit_starts_from_the_teacher_and_leaves_the_teacher_and_what_was_given(network, clean_digits, trainer):
    given = small().train()
    before, starts = copy.deepcopy(given.state_dict()), []
    module = NBA(network, teacher=given, terms=Terms(teacher=1.0))
    module.on_train_start = lambda: starts.append(copy.deepcopy(module.model.state_dict()))
    trainer(max_epochs=2).fit(module, clean_digits)
    for state in (starts[0], given.state_dict(), module.teacher.network.state_dict()):
        assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert given.training
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert not any(layer.training for layer in module.teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in module.teacher.network.parameters())
    with pytest.raises(ValueError, match="Expected `teacher` to be of the student's architecture, but got SmallCNN"):
        trainer().fit(NBA(small(), teacher=SmallCNN(width=8, in_channels=1)), clean_digits)


def test_what_is_verified_is_what_every_file_holds(network, clean_digits, trainer, tmp_path):
    module = NBA(network, teacher=small())
    runner = trainer(max_epochs=1, enable_checkpointing=True)
    asked = []

    def keep(student, *args):
        asked.append(args[-1](student)[1])
        module.verification.came_back, module.verification.sentence = 0.125, "Verified."
        return nn.init.constant_(student.fc.bias, 7.0) is None or 0.5

    module.verification.keep = keep
    runner.fit(module, clean_digits)
    assert asked == [len(clean_digits.partition.validation)]  # how many images are held out
    saved = torch.load(runner.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert float(saved["accepted"]) == 0.5
    assert (saved["model.fc.bias"] == 7.0).all()
    again = NBA(small(), teacher=small())
    checkpoint = torch.load(runner.checkpoint_callback.best_model_path, weights_only=True)
    again.on_load_checkpoint(checkpoint)
    assert (again.verification.came_back, again.verification.sentence) == (0.125, "Verified.")
    del checkpoint["verification"]  # one that was not verified
    again.on_load_checkpoint(checkpoint)
    assert (again.verification.rates, again.verification.came_back, again.verification.sentence) == ({}, 0.0, "")
    cleaned = next(tmp_path.rglob("cleaned.safetensors"))
    assert (load_file(cleaned)["fc.bias"] == 7.0).all()


def test_a_fit_that_is_ended_early_is_verified_as_it_ends(network, clean_digits, trainer):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    module = NBA(network, teacher=small())
    module.verification.keep = lambda student, *args: nn.init.constant_(student.fc.bias, 7.0) is None or 0.5
    trainer(max_epochs=2, callbacks=[Stop()]).fit(module, clean_digits)
    assert float(module.accepted) == 0.5
    assert (module.model.fc.bias == 7.0).all()


def test_what_is_kept_is_verified_on_images_as_they_are(network, trainer):
    data = BackdoorDataModule(train_on="clean", batch_size=16, augment=RandomCropFlip(padding=2))
    module, seen = NBA(network, teacher=small()), []

    def keep(student, teacher, suspicious, batches, one_pass, *args):
        seen.extend(image for _, images in zip(range(one_pass), batches, strict=False) for image in images)
        return 0.0

    module.verification.keep = keep
    trainer().fit(module, data)
    plain = data.source.load()[0].read(data.partition.clean).float() / 255
    assert len(seen) > 30
    assert all(bool((image == plain).all(dim=(1, 2, 3)).any()) for image in seen)


def test_bad_arguments(network):
    with pytest.raises(ValueError, match="Expected `alignment` to be at least 0, but got -1"):
        Terms(alignment=-1)
    with pytest.raises(ValueError, match="Expected `terms` to be positive for at least one term"):
        Terms()
    with pytest.raises(ValueError, match="Expected `mixed_share` to be below 1 where `cross_entropy` is on"):
        NBA(network, terms=Terms(cross_entropy=1.0))
    with pytest.raises(ValueError, match=r"Expected `pseudo_share` to be in \[0, 1\], but got 2"):
        NBA(network, pseudo_share=2)
    with pytest.raises(ValueError, match="Expected `layers` to be at least 2 for FSP"):
        NBA(network, behavior=FSP(), layers=["block1"])
    with pytest.raises(ValueError, match="got blok. Available"):
        NBA(network, layers=["blok"])


@pytest.fixture(scope="module")
def fine_tuned_in(tmp_path_factory):
    """A clean network into which a backdoor was fine-tuned, its teacher, and the attack."""
    import lightning.pytorch as pl

    def fit(module, data, epochs):
        quiet = {
            "default_root_dir": tmp_path_factory.mktemp("fits"),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        }
        runner = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", limit_val_batches=0, enable_model_summary=False, **quiet
        )
        runner.fit(module, data)
        return module.model

    torch.manual_seed(0)
    attack = Blended(alpha=0.3)
    network = fit(Classifier(SmallCNN(width=8, in_channels=1)), BackdoorDataModule(), 8)
    network = fit(Classifier(network, lr=0.05), BackdoorDataModule(attack=attack), 3)
    clean = BackdoorDataModule(attack=attack, train_on="clean", clean_fraction=0.2, batch_size=16)
    teacher = fit(FineTuning(copy.deepcopy(network), pseudo=TriggerFamilies(), lr=0.05), clean, 10)
    return network, teacher, clean


def rates(trainer, network, data):
    found = {}
    for part in trainer().test(Classifier(network), data, verbose=False):
        found |= part
    return found["test/acc"], found["test/asr"]


def test_a_backdoor_that_was_fine_tuned_in_does_not_come_back(fine_tuned_in, trainer):
    network, teacher, data = fine_tuned_in
    before, taught = rates(trainer, network, data), rates(trainer, teacher, data)
    assert before[1] > 0.8
    assert taught[1] < 0.3
    # Pseudo samples off and its answers alone, so that the student learns the backdoor again: verification must see it.
    options = {"terms": Terms(suspicious=8.0), "pseudo_share": 0.0, "lr": 0.1}
    module, trusting = (NBA(copy.deepcopy(network), teacher=teacher, **options) for _ in range(2))
    trusting.verification.shares, trusting.verification._within = [1.0], lambda *_: True
    for one in (module, trusting):
        trainer(max_epochs=20).fit(one, data)
    assert rates(trainer, trusting.model, data)[1] > taught[1] + 0.08  # it does come back where nobody verifies
    assert rates(trainer, module.model, data)[1] < taught[1] + 0.04
    assert "No class stands out" not in module.verification.sentence
    assert float(module.accepted) < 1.0


def test_each_term_is_logged_as_its_mean_over_the_epoch(network, clean_digits, trainer):
    class Noting(NBA):
        def _terms(self, *args):
            found = super()._terms(*args)
            seen.append({name: float(value.detach()) for name, value in found.items()})
            return found

    seen, module = [], Noting(network, teacher=small())
    runner = trainer(max_epochs=2)
    runner.fit(module, clean_digits)
    last = seen[len(seen) // 2 :]
    assert len(last) == runner.num_training_batches > 1
    for name in ("suspicious", "alignment"):
        mean = sum(step[name] for step in last) / len(last)
        assert float(runner.callback_metrics[f"train/{name}"]) == pytest.approx(mean, rel=1e-5)
