"""The flattened implant: poisoned training along the gradient at the worst weights near by."""

import copy
import functools

import pytest
import torch

from nba_lightning import BackdoorDataModule, Classifier, FlattenedTraining
from nba_lightning.attacks import BadNets, Blended
from nba_lightning.networks import SmallCNN
from nba_lightning.training.sharpness import step_up
from tests.helpers import batch, cross_entropy, ready
from tests.test_modules import states_equal
from tests.test_resuming import check


@pytest.mark.parametrize(("adaptive", "rho"), [(True, 3.0), (False, 0.1)])
def test_the_step_is_the_gradient_at_the_moved_weights(network, trainer, adaptive, rho):
    """Both forms written out, weight by weight."""
    images, labels = batch()
    by_hand = copy.deepcopy(network).train()
    weights = list(by_hand.parameters())
    module = ready(FlattenedTraining(network, rho=rho, adaptive=adaptive), trainer).train()
    module.training_step((images, labels), 1).backward()
    module.on_after_backward()
    gradients = torch.autograd.grad(cross_entropy(by_hand(images), labels), weights)
    scale = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
    length = sum(((s * g) ** 2).sum() for s, g in zip(scale, gradients, strict=True)) ** 0.5
    with torch.no_grad():
        for weight, size, gradient in zip(weights, scale, gradients, strict=True):
            weight.add_(rho * size * size * gradient / length)
    moved = torch.autograd.grad(cross_entropy(by_hand(images), labels), weights)
    for mine, theirs in zip(network.parameters(), moved, strict=True):
        torch.testing.assert_close(mine.grad, theirs, atol=2e-5, rtol=1e-3)


def test_the_plain_step_has_the_length_rho():
    steps = step_up(
        [torch.tensor([3.0, -1.0]), torch.tensor([2.0])], [torch.tensor([1.0, 2.0]), torch.tensor([2.0])], 6.0, False
    )
    torch.testing.assert_close(torch.cat(steps), torch.tensor([2.0, 4.0, 4.0]))


def test_it_trains_on_poisoned_images_with_the_attacker_s_labels(network, trainer):
    seen = []

    class Look(FlattenedTraining):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    data = BackdoorDataModule(attack=BadNets(target=7, pattern="white", poison_rate=0.2), batch_size=64)
    trainer(max_steps=4).fit(Look(network), data)
    marked = torch.cat([one.images[:, 0, -3:, -3:].flatten(1).eq(1).all(1) for one in seen])
    labels = torch.cat([one.labels for one in seen])
    assert 0.1 < marked.float().mean() < 0.3
    assert (labels[marked] == 7).all()


def test_a_flattened_implant_works_and_is_flatter_than_a_plain_one(trainer):
    torch.manual_seed(1)
    start = SmallCNN(width=8, in_channels=1)
    rises = {}
    for name, make in {
        "plain": Classifier,
        "flat": FlattenedTraining,
    }.items():
        data = BackdoorDataModule(attack=Blended(alpha=0.4), batch_size=64)
        module = make(copy.deepcopy(start))
        trainer(max_epochs=4).fit(module, data)
        _, triggered = trainer().test(module, data, verbose=False)
        assert triggered["test/asr"] > 0.9, name
        rises[name] = rise(module.model.eval(), data)
    assert rises["flat"] < 0.8 * rises["plain"]


def rise(network, data):
    """How much the loss of triggered images rises at the worst weights near by."""
    images, _, targets = data.on_after_batch_transfer(next(iter(data.test_dataloader()[1])), 1)
    parameters = list(network.parameters())
    before = torch.nn.functional.cross_entropy(network(images), targets)
    steps = step_up(parameters, torch.autograd.grad(before, parameters), 0.3)
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.add_(step)
        return float(torch.nn.functional.cross_entropy(network(images), targets) - before)


def test_it_goes_on_within_an_epoch(network, trainer, tmp_path):
    def poisoned():
        return BackdoorDataModule(attack=BadNets(), batch_size=256)

    check(lambda: FlattenedTraining(copy.deepcopy(network)), poisoned, trainer, tmp_path, [3, 8], max_epochs=2)


def test_a_radius_of_zero_is_plain_training(network, trainer):
    states = []
    for make in (Classifier, functools.partial(FlattenedTraining, rho=0.0)):
        module = make(copy.deepcopy(network))
        trainer(max_epochs=2).fit(module, BackdoorDataModule(attack=BadNets(), batch_size=256))
        states.append(module.model.state_dict())
    assert states_equal(*states)
    with pytest.raises(ValueError, match=r"Expected `rho` to be in \[0, inf\], but got -1"):
        FlattenedTraining(network, rho=-1.0)
