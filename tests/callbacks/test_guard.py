"""What lost too much clean accuracy is not handed over as cleaned."""

import copy
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import NAD, FineTuning
from nba_lightning.callbacks import CleanedWeights, Guard, RejectedError
from nba_lightning.callbacks.guard import Answers
from nba_lightning.core.paired import Paired


class Brightest(nn.Module):
    """The class is the brightest of four pixels."""

    feature_layers = ["first"]

    def __init__(self, scale=20.0):
        super().__init__()
        self.first, self.fc = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(4, 4)
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.fc.weight.copy_(scale * torch.eye(4))
            self.fc.bias.zero_()

    def forward(self, images):
        return self.fc(self.first(images).flatten(1))


def loader(number, shift=0, batch_size=8):
    generator = torch.Generator().manual_seed(number)
    images = torch.rand(number, 1, 2, 2, generator=generator)
    labels = (images.flatten(1).argmax(dim=1) + shift) % 4
    return DataLoader(TensorDataset(images, labels), batch_size)


def ruined(number=48):
    """A loader that teaches other classes."""
    return loader(number, shift=1)


def fit(trainer, guard, train, held_out, epochs=3, lr=0.5, module=None, **kwargs):
    module = module or FineTuning(Brightest(), lr=lr)
    runner = trainer(max_epochs=epochs, callbacks=[guard], **kwargs)
    runner.fit(module, train, held_out)
    return runner, module


def test_a_ruined_student_is_rejected_with_its_figures(trainer, tmp_path):
    guard = Guard()
    with pytest.warns(UserWarning, match=r"Rejected: the fitted network is right on \d+ of 60 held-out images"):
        runner, module = fit(trainer, guard, ruined(), loader(60), epochs=20)
    assert guard.verdict == "rejected"
    after = guard.accuracies["student"]
    assert guard.accuracies["suspicious"].value == 1.0
    assert after.value < 0.5
    assert after.images == 60
    assert after.standard_error == pytest.approx(math.sqrt(after.value * (1 - after.value) / 60))
    assert f"right on {round(after.value * 60)} of 60" in guard.sentence
    assert "smaller learning rate, fewer steps or more clean images" in guard.sentence
    assert runner.callback_metrics["guard/student"] == pytest.approx(after.value)
    assert not (tmp_path / "cleaned.safetensors").exists()
    assert torch.equal(load_file(tmp_path / "rejected.safetensors")["fc.weight"], module.model.fc.weight)


def test_a_named_file_of_cleaned_weights_is_not_written_either(trainer, tmp_path):
    guard, path = Guard(), tmp_path / "mine" / "network.safetensors"
    runner = trainer(max_epochs=20, callbacks=[CleanedWeights(str(path)), guard])  # asked before the guard's own hook
    with pytest.warns(UserWarning, match="Rejected"):
        runner.fit(FineTuning(Brightest(), lr=0.5), ruined(), loader(60))
    assert [one.name for one in path.parent.iterdir()] == ["rejected.safetensors"]


def test_a_student_that_lost_nothing_is_accepted(trainer, tmp_path):
    guard = Guard()
    fit(trainer, guard, loader(48), loader(60), lr=0.01)
    assert guard.verdict == "accepted"
    assert guard.sentence.startswith("Accepted: the fitted network is right on 60 of 60 held-out images")
    assert (tmp_path / "cleaned.safetensors").is_file()
    assert not (tmp_path / "rejected.safetensors").exists()


@pytest.mark.parametrize("held_out", [6, None])
def test_with_few_images_it_says_that_it_cannot_know(trainer, tmp_path, held_out):
    guard = Guard()
    loaders = None if held_out is None else loader(held_out)
    with pytest.warns(UserWarning, match="cannot know"):
        fit(trainer, guard, loader(48), loaders, lr=0.01)
    assert guard.verdict == "unknown"
    assert (tmp_path / "cleaned.safetensors").is_file()
    if held_out:
        low, high = Paired(6, 0, 0).interval()
        assert f"from {100 * low:.1f} to {100 * high:.1f} points (95 %" in guard.sentence
        assert high == pytest.approx(1.96 / 8)


def test_a_wreck_is_rejected_with_few_images_too(trainer):
    guard = Guard()
    with pytest.warns(UserWarning, match="Rejected"):
        fit(trainer, guard, ruined(), loader(20), epochs=20)
    assert guard.verdict == "rejected"


def test_a_teacher_may_lose_what_is_said_of_it(trainer):
    teacher = Brightest()
    with torch.no_grad():
        teacher.fc.weight.copy_(teacher.fc.weight.roll(1, 0))
    guard = Guard(teacher_max_loss=1.0)
    fit(trainer, guard, loader(48), loader(60), module=NAD(Brightest(), teacher=teacher, betas=[1.0], lr=0.01))
    assert guard.accuracies["teacher"].value == 0.0
    with pytest.raises(RejectedError, match=r"more than `teacher_max_loss` \(99.0 points\)"):
        fit(
            trainer,
            Guard(teacher_max_loss=0.99),
            loader(48),
            loader(60),
            module=NAD(Brightest(), teacher=teacher, betas=[1.0]),
        )


def test_a_ruined_teacher_ends_the_fit_before_its_first_step(trainer, tmp_path):
    teacher = Brightest()
    with torch.no_grad():
        teacher.fc.weight.copy_(teacher.fc.weight.roll(1, 0))
    module = NAD(Brightest(), teacher=teacher, betas=[1.0], lr=0.01)
    before = copy.deepcopy(module.model.state_dict())
    with pytest.raises(RejectedError, match=r"the teacher is right on 0 of 60 .* of 100.0 points .* Make the"):
        fit(trainer, Guard(), loader(48), loader(60), module=module)
    assert torch.equal(module.model.fc.weight, before["fc.weight"])
    assert not list(tmp_path.glob("*.safetensors"))


class FromElsewhere(FineTuning):
    """Begins with other weights than those that came in, as NBA does with its teacher's."""

    def setup(self, stage):
        super().setup(stage)
        with torch.no_grad():
            self.model.fc.weight.copy_(self.model.fc.weight.roll(1, 0))


def test_it_compares_with_the_network_that_came_in_not_with_what_the_fit_began_with(trainer):
    guard = Guard()
    with pytest.warns(UserWarning, match="Rejected: the fitted network is right on 0 of 60"):
        fit(trainer, guard, ruined(), loader(60), module=FromElsewhere(Brightest(), lr=0.01))
    assert guard.accuracies["suspicious"].value == 1.0


def test_it_stops_early_where_that_is_asked_for(trainer, tmp_path):
    guard = Guard(every_n_epochs=2)
    with pytest.warns(UserWarning, match="Rejected"):
        runner, _ = fit(trainer, guard, ruined(), loader(60), epochs=50, lr=1.0)
    assert guard.verdict == "rejected"
    assert runner.current_epoch < 50
    assert runner.current_epoch % 2 == 0
    assert (tmp_path / "rejected.safetensors").is_file()


def test_a_fit_that_goes_on_compares_with_the_network_that_came_in(trainer, tmp_path):
    last = tmp_path / "last.ckpt"
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, enable_version_counter=False)
    runner = trainer(max_epochs=40, max_steps=60, callbacks=[Guard(), saver], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="Rejected"):
        runner.fit(FineTuning(Brightest(), lr=0.5), ruined(), loader(60))
    assert last.is_file()
    guard = Guard()
    runner = trainer(max_epochs=40, callbacks=[guard])
    with pytest.warns(UserWarning, match="Rejected"):
        runner.fit(FineTuning(Brightest(), lr=0.5), ruined(), loader(60), ckpt_path=last)
    assert guard.accuracies["suspicious"].value == 1.0
    other = Guard()  # other held-out images: nothing to compare with
    runner = trainer(max_epochs=40, callbacks=[other])
    with pytest.warns(UserWarning, match="cannot know what was lost"):
        runner.fit(FineTuning(Brightest(), lr=0.5), ruined(), loader(64), ckpt_path=last)
    assert other.verdict == "unknown"


def test_a_second_fit_starts_afresh(trainer):
    guard, module = Guard(), FineTuning(Brightest(), lr=0.5)
    with pytest.warns(UserWarning, match="Rejected"):
        fit(trainer, guard, ruined(), loader(60), epochs=20, module=module)
    assert "a gain" not in guard.sentence
    fit(trainer, guard, ruined(), loader(60), epochs=1, module=module)
    assert guard.verdict == "accepted"  # compared with what this fit began with
    assert guard.accuracies["suspicious"].value < 0.5


def test_it_is_in_the_loggers_files(trainer, tmp_path):
    fit(trainer, Guard(), loader(48), loader(60), lr=0.01, logger=CSVLogger(tmp_path, name="", version=""))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for role in ("suspicious", "student"):
        assert [row[f"guard/{role}"] for row in rows if row[f"guard/{role}"]] == ["1.0"]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 1), (10, 2), (7, 7)])
def test_the_paired_standard_error_is_that_of_the_mean_difference(lost, gained):
    before, after = torch.zeros(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)
    before[:lost], after[lost : lost + gained] = True, True
    pair = Paired.of(before, after)
    difference = before.double() - after.double()
    assert pair.loss == pytest.approx(float(difference.mean()))
    assert pair.standard_error == pytest.approx(float(difference.std(correction=0)) / math.sqrt(50))


def test_the_exact_test_is_the_binomial_one():
    from scipy.stats import binomtest

    for lost, gained in [(0, 0), (3, 0), (6, 1), (9, 9)]:
        expected = 1.0 if lost + gained == 0 else binomtest(lost, lost + gained, alternative="greater").pvalue
        assert Paired(20, lost, gained).p_value() == pytest.approx(expected)


class Leaving(SingleDeviceStrategy):
    """Takes the network off the GPU before `on_fit_end`, as Lightning does."""

    def teardown(self):
        super().teardown()
        self.lightning_module.model.away = True


class Placed(Brightest):
    away = False

    def to(self, *args, **kwargs):
        self.away = False
        return super().to(*args, **kwargs)

    def forward(self, images):
        assert not self.away, "the images are on the GPU, the network is not"
        return super().forward(images)


def test_the_student_is_asked_on_the_device_that_the_fit_has_left(trainer):
    guard = Guard()
    runner = trainer(callbacks=[guard], strategy=Leaving("cpu"))
    runner.fit(FineTuning(Placed(), lr=1e-6), loader(16), loader(60))
    assert guard.verdict == "accepted"


def test_a_loss_within_chance_is_accepted():
    guard = Guard()
    labels = torch.zeros(50, dtype=torch.long)
    predicted = labels.clone()
    predicted[:3] = 1  # 6 points, standard error 3.4
    guard._before = Answers(labels, labels)
    verdict, sentence = guard._judge("student", Answers(labels, predicted))
    assert verdict == "accepted"
    assert "the loss of 6.0 points (standard error 3.4) is more than `max_loss` (5.0 points), but may be ch" in sentence
    predicted[:6] = 1  # 12 points, standard error 4.6
    assert guard._judge("student", Answers(labels, predicted))[0] == "rejected"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_loss": 1.5}, "`max_loss`"), ({"every_n_epochs": -1}, "`every_n_epochs`"), ({"min_images": 0}, "`min_im")],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guard(**arguments)


def test_two_processes_count_every_image_once(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, "-m", "tests.processes.guarded", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["ours"]["images"] == 69  # which two processes do not share evenly
    assert found[0]["theirs"]["images"] == 61  # each process went through all of them
    assert found[0]["theirs"]["value"] == 1.0
