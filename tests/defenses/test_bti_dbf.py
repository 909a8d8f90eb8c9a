"""BTI-DBF (U) against independent formulations."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from nba_lightning import BTIDBF, BackdoorDataModule, Batch
from nba_lightning.attacks import BadNets
from nba_lightning.networks import SmallCNN
from nba_lightning.networks.u_net import UNet
from tests.helpers import batch, cross_entropy, lively, ready, small
from tests.test_folding import Tokens

SHORT = {"round_epochs": 2, "mask_epochs": 1, "generator_epochs": 1, "generator_width": 4}


def convolutions(network, images):
    """The features of a SmallCNN that are divided."""
    x = F.max_pool2d(network.block1(network.normalize(images)), 2)
    return network.block3(F.max_pool2d(network.block2(x), 2))


def rest(network, features):
    """What follows them."""
    return network.fc(features.mean(dim=(2, 3)))


def bti(trainer, **kwargs):
    module = ready(BTIDBF(lively(small()), **SHORT | kwargs), trainer).train()
    return module, copy.deepcopy(module.model)


def batches(number, size=8):
    torch.manual_seed(4)
    return [Batch(*batch(size)) for _ in range(number)]


def test_the_mask_keeps_what_the_labels_need_and_leaves_what_they_do_not(trainer):
    module, network = bti(trainer)
    (images, labels), mask = batch(8), torch.rand(1, 16, 2, 2)
    own = copy.deepcopy(network)
    found = convolutions(own, images)
    wanted = cross_entropy(rest(own, mask * found), labels) - cross_entropy(rest(own, (1 - mask) * found), labels)
    torch.testing.assert_close(module.mask_loss(network, images, labels, mask), wanted)
    assert not network.block3._forward_hooks


def test_the_mask_is_found_by_adam_from_noise_in_the_mode_of_training(trainer):
    module, network = bti(trainer, mask_lr=0.1)
    given, own = batches(3), copy.deepcopy(network)
    mask = module.decouple(network.requires_grad_(False), iter(given), 3)
    raws = []
    module.mask_loss = lambda network, images, labels, mask: raws.append(mask.detach()) or mask.sum() * 0
    module.decouple(network, iter(given), 1)
    raw = torch.atanh(2 * raws[0] - 1).requires_grad_()
    assert 0.7 < float(raw.detach().std()) < 1.3
    optimizer = torch.optim.Adam([raw], 0.1)
    for one in given:
        scaled, found = raw.tanh() / 2 + 0.5, convolutions(own, one.images).detach()
        loss = cross_entropy(rest(own, scaled * found), one.labels)
        optimizer.zero_grad()
        (loss - cross_entropy(rest(own, (1 - scaled) * found), one.labels)).backward()
        optimizer.step()
    torch.testing.assert_close(mask, raw.detach().tanh() / 2 + 0.5, atol=1e-3, rtol=1e-3)
    assert 0 <= float(mask.min()) < float(mask.max()) <= 1


@pytest.mark.parametrize("target", [-1, 3])
@pytest.mark.parametrize(("image_bound", "feature_bound"), [(1e9, 1e9), (1e-9, 1e9), (1e9, 0.0)])
def test_the_generator_s_loss_is_the_equation(target, image_bound, feature_bound, trainer):
    module, network = bti(trainer, image_bound=image_bound, feature_bound=feature_bound)
    network.eval().requires_grad_(False)
    (images, _), mask = batch(8), torch.rand(1, 16, 2, 2)
    inversion = module._found(images)
    inversion.target = target
    loss = module.inversion_loss(network, images, mask)
    generated = images + 0.2 * inversion.generator((images - 0.5) / 0.2)  # units of the authors' images
    apart = convolutions(network, images) - convolutions(network, generated)
    if (image_bound, feature_bound) == (1e9, 1e9):
        wanted = 0.01 * (mask * apart).square().mean() - ((1 - mask) * apart).square().mean()
    else:
        wanted = (((generated - images) / 0.2) ** 2).mean()
    if target >= 0:
        wanted = wanted + cross_entropy(network(generated), torch.full((8,), target))
    torch.testing.assert_close(loss, wanted)
    parameters = list(inversion.generator.parameters())
    slopes = (torch.autograd.grad(one, parameters) for one in (loss, wanted))
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_a_round_trains_the_generator_on_a_copy_and_leaves_the_network_as_it_is(trainer):
    module, _ = bti(trainer, generator_epochs=3)
    before, seen, modes = copy.deepcopy(module.model.state_dict()), [], []
    loss = module.inversion_loss
    module.inversion_loss = lambda network, images, mask: (
        modes.append({part.training for part in network.modules()}) or seen.append(mask) or loss(network, images, mask)
    )
    first = copy.deepcopy(module._found(batch(8)[0]).generator.state_dict())
    module._invert(itertools.cycle(batches(2)), 2)
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in module.model.parameters())
    assert module.model.training
    assert modes == [{False}] * 6
    assert all(one is seen[0] for one in seen)
    assert not any(torch.equal(value, first[n]) for n, value in module.inversion.generator.state_dict().items())


def test_unlearning_is_the_equation(trainer):
    module, _ = bti(trainer)
    network, (images, labels) = copy.deepcopy(module.model), batch(24)
    inversion, changed = module._found(images), []
    inversion.generator.forward = lambda inputs: changed.append(inputs) or torch.full_like(inputs, 2.0)
    loss = module.training_step((images, labels), 1)
    loss.backward()
    chosen = [next(i for i in range(24) if torch.allclose((images[i] - 0.5) / 0.2, one)) for one in changed[0]]
    assert len(set(chosen)) == 3  # a tenth and one
    mixed = images.clone()
    mixed[chosen] += 0.4
    clean, found = convolutions(network, images), convolutions(network, mixed)
    wanted = cross_entropy(rest(network, found), labels) + ((clean - found) ** 2).mean()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)
    slopes = torch.autograd.grad(wanted, list(network.parameters()))
    for parameter, slope in zip(module.model.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, atol=1e-4, rtol=1e-3)
    module.training_step((images, labels), 2)
    assert not torch.equal(changed[0], changed[1])  # others, in the next batch


class Brightness(nn.Module):
    """Says how bright an image is, in four classes."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(1, 1, 1)

    def forward(self, images):
        levels = self.maps(images).mean(dim=(1, 2, 3), keepdim=True).flatten(1)
        return -((levels - torch.tensor([0.0, 0.5, 1.0, 1.5])) ** 2)


def test_the_target_is_what_most_generated_images_become(trainer):
    network = Brightness()
    nn.init.ones_(network.maps.weight)
    nn.init.zeros_(network.maps.bias)
    module = ready(BTIDBF(network, layer="maps", **SHORT), trainer)
    images = torch.full((6, 1, 8, 8), 0.5)
    given = [Batch(images, torch.ones(6).long()) for _ in range(2)]
    for added, target in ((0.5, 2), (1.0, 3), (-0.6, 0)):
        module._found(images).generator.forward = lambda inputs, added=added: torch.full_like(inputs, added / 0.2)
        assert module._likeliest_target(iter(given), 2) == target


def test_rounds_begin_where_they_should_and_the_first_one_names_the_target(trainer, clean_digits):
    module, rounds, targets = BTIDBF(small(), **SHORT), [], []
    invert, likeliest = module._invert, module._likeliest_target
    module._likeliest_target = lambda *args: targets.append(likeliest(*args)) or 7

    def note(given, number):
        before = None if module.inversion is None else module.inversion.target
        invert(given, number)
        rounds.append((module.trainer.current_epoch, number, before, module.inversion.target))

    module._invert = note
    trainer(max_epochs=5).fit(module, clean_digits)
    number = len(clean_digits.train_dataloader())
    assert rounds == [(0, number, None, 7), (2, number, 7, 7), (4, number, 7, 7)]
    assert len(targets) == 1
    trainer(max_epochs=1).fit(module, clean_digits)
    assert rounds[-1] == (0, number, None, 7)  # another fit looks anew


@pytest.mark.parametrize("kill", [3, 5, 7])
def test_a_fit_goes_on_with_the_generator_that_it_had(kill, trainer, tmp_path):
    """Four batches an epoch, a checkpoint after every second: within the first round, at its end, within the next."""

    class Kill(pl.Callback):
        at = 10**9

        def on_train_batch_start(self, trainer, *args):
            if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
                raise InterruptedError

    def run(folder, at, resume=False):
        module, stop = BTIDBF(small(), **SHORT | {"round_epochs": 1}), Kill()
        stop.at = at
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=2)
        runner = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saver, stop])
        data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=15)
        last = tmp_path / folder / "last.ckpt" if resume else None
        if at < 10**9:
            with pytest.raises(InterruptedError):
                runner.fit(module, data, ckpt_path=last, weights_only=True)
        else:
            runner.fit(module, data, ckpt_path=last, weights_only=True)
        return module

    whole = run("whole", 10**9)
    run("part", kill)
    again = run("part", 10**9, resume=True)
    assert again.inversion.target == whole.inversion.target
    pairs = [(one.model.state_dict(), one.inversion.generator.state_dict()) for one in (whole, again)]
    for mine, theirs in zip(*pairs, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_transformers_and_few_images_and_two_classes(trainer, clean_digits):
    network = Tokens()
    before = copy.deepcopy(network.state_dict())
    module = BTIDBF(network, layer="block", **SHORT)
    trainer().fit(module, clean_digits)
    assert not any(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    images = torch.utils.data.TensorDataset(torch.rand(3, 3, 9, 13), torch.tensor([0, 1, 0]))
    two = SmallCNN(width=4, num_classes=2)
    trainer(max_epochs=2).fit(BTIDBF(two, **SHORT), torch.utils.data.DataLoader(images, 16))
    assert all(torch.isfinite(value).all() for value in two.state_dict().values())


def test_bad_arguments_of_bti_dbf(network):
    with pytest.raises(ValueError, match="Expected `round_epochs` to be at least 1, but got 0"):
        BTIDBF(network, round_epochs=0)
    with pytest.raises(ValueError, match=r"Expected `image_bound` to be in \(0, inf\], but got 0"):
        BTIDBF(network, image_bound=0)
    with pytest.raises(ValueError, match="Expected `layers` to be names of layers of SmallCNN, but got block9"):
        BTIDBF(network, layer="block9")
    assert BTIDBF(network).observed_layers() == ["block3"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 9, 13), (3, 3, 5), (4, 2, 2)])
def test_the_generator_takes_any_image_and_is_a_function_of_its_seed_and_of_each_image(shape):
    state = torch.get_rng_state()
    network, again, other = (UNet(shape, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(3, *shape)
    found = network(images)
    assert found.shape == images.shape
    assert torch.equal(found, again(images))
    assert not torch.equal(found, other(images))
    torch.testing.assert_close(network(images[1:2]), found[1:2], atol=1e-5, rtol=1e-4)
    assert float((found - network(images.roll(1, 0))).abs().max()) > 1e-4


def test_the_generator_sees_all_of_an_image_and_its_details_too():
    network, images, seen = UNet((1, 32, 32), 4, torch.Generator().manual_seed(1)), torch.rand(1, 1, 32, 32), {}
    for name, stage in [*network.down.named_children(), *((f"up{n}", one) for n, one in network.up.named_children())]:
        stage.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    network(images)
    assert [tuple(seen[str(depth)][1].shape[1:]) for depth in range(5)] == [
        (4, 32, 32),
        (8, 16, 16),
        (16, 8, 8),
        (32, 4, 4),
        (64, 2, 2),
    ]
    for depth in range(4):  # the last stages up get what the first ones down saw
        handed = seen[f"up{3 - depth}"][0]
        torch.testing.assert_close(handed[:, -(4 * 2**depth) :], seen[str(depth)][1])
