"""NPD against independent formulations."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from nba_lightning import NPD, BackdoorDataModule
from nba_lightning.attacks import BadNets
from nba_lightning.defenses.npd import likeliest_wrong, within
from nba_lightning.networks import SmallCNN
from tests.helpers import batch, cross_entropy, lively, ready, small
from tests.test_folding import Tokens


def polarised(network, polarizer):
    """A copy of the network as it came, with an explicit polarizer: a 1x1 convolution and BatchNorm on padded input."""
    other = copy.deepcopy(network)
    conv = other.block3[0]
    channels = conv.in_channels
    kernel, norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
    kernel.weight = nn.Parameter(polarizer.matrix.detach().clone().view(channels, channels, 1, 1))
    norm.weight, norm.bias = (nn.Parameter(one.detach().clone()) for one in (polarizer.scale, polarizer.shift))
    norm.running_mean, norm.running_var = polarizer.mean.clone(), polarizer.variance.clone()
    conv.padding, other.plug = (0, 0), nn.Sequential(kernel, norm).eval()
    conv.register_forward_pre_hook(lambda _, inputs: other.plug(F.pad(inputs[0], (1, 1, 1, 1))))
    return other.eval()


def npd(trainer, **kwargs):
    """With a polarizer that has learned something, and the network with it, made by hand."""
    network = lively(small())
    network.fc.weight.data *= 30.0  # so that it does not say the same of all images
    came = copy.deepcopy(network)
    module = ready(NPD(network, **kwargs), trainer).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        module.polarizer.matrix.add_(0.2 * torch.randn(module.polarizer.matrix.shape, generator=generator))
        for one, low, high in (
            (module.polarizer.scale, 0.5, 1.5),
            (module.polarizer.shift, -0.5, 0.5),
            (module.polarizer.mean, -0.5, 0.5),
            (module.polarizer.variance, 0.5, 1.5),
        ):
            one.uniform_(low, high, generator=generator)
    return module, polarised(came, module.polarizer)


def test_npd_s_loss_and_gradients_are_the_equation(trainer):
    module, by_hand = npd(trainer, clean=1.5, perturbed=0.7, wrong=0.3, target=0.9)
    images, labels = batch(12)
    with torch.no_grad():
        labels[::2] = by_hand(images).argmax(dim=1)[::2]  # right on half of them
    shift, asked, same = torch.randn_like(images) * torch.linspace(0.1, 3.0, 12).view(-1, 1, 1, 1), [], []
    module.craft = lambda *args: asked.append(args) or shift
    loss = module.training_step((images, labels), 1)
    loss.backward()
    logits, led = by_hand(images), by_hand((images + shift).clamp(0, 1))
    terms = 0.0
    for i, label in enumerate(labels.tolist()):
        wrongs = [k for k in range(10) if k != label]
        target = max(wrongs, key=lambda k: logits[i, k].item())
        other = max(wrongs, key=lambda k: led[i, k].item())
        assert int(asked[0][1][i]) == target
        same.append(other == target)
        p = led[i].softmax(dim=0)
        for weight, k in ((0.3, other), (0.9, target)):
            terms = terms - weight * (1.0001 - p[k]).log() / 12
    assert 0 < sum(same) < 12
    terms = terms + 1.5 * cross_entropy(logits, labels) + 0.7 * cross_entropy(led, logits.argmax(dim=1))
    torch.testing.assert_close(loss, terms, atol=1e-5, rtol=1e-4)
    kernel, norm = by_hand.plug
    slopes = torch.autograd.grad(terms, [kernel.weight, norm.weight, norm.bias])
    for parameter, slope in zip(module.polarizer.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope.view_as(parameter), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bound", [0.2, 100.0])
def test_npd_s_perturbations_are_signed_descent_to_the_targets_in_a_euclidean_ball(bound, trainer):
    module, by_hand = npd(trainer, bound=bound, steps=3, step_size=0.02)
    images, labels = batch(8)
    targets = (labels + 1) % 10
    shift = torch.zeros_like(images)
    for step in range(3):
        shift.requires_grad_()
        logits = by_hand((images + shift).clamp(0, 1))
        assert step == 0 or (logits.argmax(dim=1) == targets).float().mean() <= 0.6
        slope = torch.autograd.grad(cross_entropy(logits, targets), shift)[0]
        shift = (shift - 0.02 * slope.sign()).detach()
        shift = torch.stack([one * min(1.0, bound / math.sqrt(float((one**2).sum()))) for one in shift])
    found = module.craft(images, targets, module.folded())
    assert float((found - shift).abs().gt(1e-5).float().mean()) <= 0.02
    assert float(found.flatten(1).norm(dim=1).max()) <= bound + 1e-4
    assert not found.requires_grad


def test_npd_s_perturbations_go_no_further_when_enough_images_are_led_astray(trainer):
    module, _ = npd(trainer, steps=4, step_size=0.01)
    images, _ = batch(8)
    with torch.no_grad():
        module._write()
        answers = module(images).argmax(dim=1)
    few, many = (answers + (torch.arange(8) >= right) for right in (4, 5))  # half of them is not enough, 62 % is
    steps = [float(module.craft(images, targets % 10, module.folded()).abs().max()) / 0.01 for targets in (few, many)]
    assert steps[0] > 1.5
    assert steps[1] == pytest.approx(1.0)  # the first step is always made
    module.reduce = lambda share: share + 0.2  # other processes have more
    assert float(module.craft(images, few % 10, module.folded()).abs().max()) / 0.01 == pytest.approx(1.0)


def test_npd_measures_clean_images_as_they_come_and_starts_with_standardised_features(clean_digits, trainer):
    network = lively(small())
    came, seen = copy.deepcopy(network).eval(), []
    module = NPD(network, lr=1e-9)
    trainer(max_steps=1, max_epochs=-1).fit(module, clean_digits)
    came.block3[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for found in clean_digits.train_dataloader():
        came(clean_digits.on_after_batch_transfer(found, 0).images)
    features = torch.cat(seen)
    torch.testing.assert_close(module.polarizer.mean, features.mean(dim=(0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        module.polarizer.variance, features.var(dim=(0, 2, 3), unbiased=False), atol=1e-4, rtol=1e-3
    )
    images = torch.rand(4, 1, 8, 8)
    came.block3[0]._forward_pre_hooks.clear()
    torch.testing.assert_close(network.eval()(images), polarised(came, module.polarizer)(images), atol=1e-3, rtol=1e-3)


def test_npd_changes_one_layer_and_its_batchnorm_s_bias_and_no_key(clean_digits, trainer, tmp_path):
    network = lively(small())
    before = copy.deepcopy(network.state_dict())
    module = NPD(network)
    trainer(max_epochs=2).fit(module, clean_digits)
    cleaned = load_file(tmp_path / "cleaned.safetensors")
    assert cleaned.keys() == before.keys()
    changed = {name for name, value in before.items() if not torch.equal(cleaned[name], value)}
    assert changed == {"block3.0.weight", "block3.1.bias"}
    assert all(parameter.requires_grad for parameter in network.parameters())
    images = torch.rand(4, 1, 8, 8)
    network.load_state_dict(before)
    torch.testing.assert_close(
        polarised(network, module.polarizer)(images), module_of(cleaned)(images), atol=1e-3, rtol=1e-3
    )


def module_of(state):
    network = small()
    network.load_state_dict(state)
    return network.eval()


def test_npd_s_network_is_polarised_in_every_checkpoint_and_rests_while_the_polarizer_learns(clean_digits, trainer):
    network = lively(small())
    came, steps = copy.deepcopy(network), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            images = batch.images[:4]
            by_hand = polarised(came, module.polarizer)(images)
            torch.testing.assert_close(network(images), by_hand, atol=1e-3, rtol=1e-3)
            assert not any(one.requires_grad or one.grad is not None for one in network.parameters())
            assert not network.training
            steps.append(1)

    trainer(max_steps=3, max_epochs=-1, callbacks=[Look()]).fit(NPD(network), clean_digits)
    assert len(steps) == 3


def test_npd_works_on_tokens_where_a_layer_is_named(clean_digits, trainer):
    with pytest.raises(ValueError, match=r"Expected `layer` to be named for Tokens, as one of embed, block\.1"):
        NPD(Tokens())
    network = Tokens()
    before = copy.deepcopy(network.state_dict())
    trainer().fit(NPD(network, layer="block.1"), clean_digits)
    changed = {name for name, value in before.items() if not torch.equal(network.state_dict()[name], value)}
    assert changed == {"block.1.weight", "block.1.bias"}


def test_npd_takes_two_classes_and_fewer_images_than_a_batch(trainer):
    images = torch.utils.data.TensorDataset(torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 0, 1, 1]))
    network = SmallCNN(width=4, in_channels=1, num_classes=2)
    trainer(max_epochs=2).fit(NPD(network), torch.utils.data.DataLoader(images, 16))
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_a_layer_that_is_never_called_is_named(clean_digits, trainer):
    network = small()
    network.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="one that the network's forward pass calls, but got 'unused'"):
        trainer().fit(NPD(network, layer="unused"), clean_digits)


def test_parts_of_npd_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, -200.0, -300.0]])
    assert likeliest_wrong(logits, torch.tensor([0, 0])).tolist() == [1, 1]
    assert likeliest_wrong(logits, torch.tensor([1, 2])).tolist() == [0, 0]
    far, near = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 0.5)
    torch.testing.assert_close(within(torch.cat([far, near]), 2.0), torch.cat([far / 2, near]))
    assert torch.equal(within(torch.zeros(1, 1, 2, 2), 1.0), torch.zeros(1, 1, 2, 2))


def test_bad_arguments_of_npd(network):
    with pytest.raises(ValueError, match="Expected `layer` to be a convolution without groups or a linear layer"):
        NPD(network, layer="block1")
    with pytest.raises(ValueError, match="Expected `steps` to be at least 1, but got 0"):
        NPD(network, steps=0)
    with pytest.raises(ValueError, match="Expected `wrong` to be at least 0, but got -1"):
        NPD(network, wrong=-1)


def test_npd_resumes_with_the_weights_that_came(trainer, tmp_path):
    """The polarizer is folded into what the network came with, not into what an earlier step left."""
    data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=16)
    network = lively(small())
    came = network.block3[0].weight.detach().clone()
    runner = trainer(max_steps=2, max_epochs=-1, enable_checkpointing=True)
    runner.fit(NPD(network), data)
    runner.save_checkpoint(tmp_path / "m.ckpt")
    again = NPD.load_from_checkpoint(tmp_path / "m.ckpt", model=small(seed=4), weights_only=True)
    torch.testing.assert_close(again.own_weight, came)
    assert bool(again.measured)
