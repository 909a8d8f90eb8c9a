"""RNP against independent formulations."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import RNP
from nba_lightning.callbacks import NonFiniteLossError
from tests.defenses.test_fst import constant
from tests.helpers import batch, cross_entropy, lively, ready, small


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def loaders(*sizes, size=8):
    """Loaders that do not shuffle, with their batches as lists."""
    sets = [[batch(size) for _ in range(number)] for number in sizes]
    return sets, [DataLoader(TensorDataset(*map(torch.cat, zip(*one, strict=True))), size) for one in sets]


def unlearned_by_hand(network, batches, rounds, lr):
    """Ascent by momentum SGD with weight decay, from the definition; a tenth of the rate from half of the rounds on."""
    network = copy.deepcopy(network).train()
    velocity = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    for step in range(4 * rounds):
        images, labels = batches[step % len(batches)]
        network.zero_grad()
        cross_entropy(network(images), labels).backward()
        rate = lr if step < 4 * (rounds // 2) else lr / 10
        with torch.no_grad():
            for name, value in network.named_parameters():
                velocity[name] = 0.9 * velocity[name] - value.grad + 5e-4 * value
                value.sub_(rate * velocity[name])
    return network


def recovered_by_hand(unlearned, batches, alpha, lr):
    """Masks after momentum SGD in which every BatchNorm of the unlearned network is written out."""
    masks = [torch.ones(norm.num_features) for norm in norms_of(unlearned)]
    velocity = [torch.zeros_like(mask) for mask in masks]

    def write_out(norm, mask):
        def hook(_, inputs, output):
            x, shape = inputs[0], (1, -1, 1, 1)
            mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
            scaled = (x - mean.view(shape)) / (variance.view(shape) + norm.eps) ** 0.5
            return scaled * (norm.weight.detach() * mask).view(shape) + norm.bias.detach().view(shape)

        return norm.register_forward_hook(hook)

    for images, labels in batches:
        masks = [mask.requires_grad_() for mask in masks]
        hooks = [write_out(norm, mask) for norm, mask in zip(norms_of(unlearned), masks, strict=True)]
        slopes = torch.autograd.grad(alpha * cross_entropy(unlearned(images), labels), masks)
        for hook in hooks:
            hook.remove()
        velocity = [0.9 * old + slope for old, slope in zip(velocity, slopes, strict=True)]
        masks = [(m.detach() - lr * v).clamp(0, 1) for m, v in zip(masks, velocity, strict=True)]
    return masks


def test_rnp_unlearns_recovers_and_prunes_as_the_equations_say(trainer):
    network = lively(small())
    (batches,), (loader,) = loaders(3)
    suspicious = copy.deepcopy(network)
    unlearned = unlearned_by_hand(network, batches, rounds=3, lr=0.02)
    masks = recovered_by_hand(unlearned, batches, alpha=0.3, lr=4.0)
    settings = {"unlearning_rounds": 3, "unlearning_lr": 0.02, "unlearned_accuracy": 0.0, "scheduler": constant}
    module = RNP(network, **settings, alpha=0.3, lr=4.0, max_drop=1.0)
    with pytest.warns(UserWarning, match="After 3 rounds of unlearning the network is still right on"):
        trainer().fit(module, loader)
    for name, value in unlearned.named_parameters():
        torch.testing.assert_close(module.unlearned[name], value, atol=1e-5, rtol=1e-3)
    for found, wanted in zip(module.masks, masks, strict=True):
        torch.testing.assert_close(found.detach(), wanted, atol=1e-3, rtol=0)
    gone = torch.cat(masks) <= 0.9  # all accuracy may go
    assert 0 < int(gone.sum()) < len(gone)
    before, after = suspicious.state_dict(), network.state_dict()
    for norm, mask in zip(module.norms, masks, strict=True):
        before[f"{norm}.weight"][mask <= 0.9] = 0.0
    assert all(torch.equal(after[name], value) for name, value in before.items())  # all else is the suspicious one's


def test_unlearning_ends_with_the_round_that_the_network_fails(trainer):
    steps, (_, (loader,)) = [], loaders(1)
    for accuracy, rounds in ((1.0, 1), (0.0, 5)):
        module = RNP(small(), unlearned_accuracy=accuracy, unlearning_rounds=5, unlearning_lr=1e-6)
        ascend = module._ascend
        module._ascend = lambda *args, ascend=ascend: steps.append(1) or ascend(*args)
        if accuracy:
            trainer().fit(module, loader)
        else:
            with pytest.warns(UserWarning, match="more than `unlearned_accuracy`"):
                trainer().fit(module, loader)
        assert len(steps) == 4 * rounds
        steps.clear()


def test_unlearning_without_bounds_is_named(trainer):
    _, (loader,) = loaders(2)
    with pytest.raises(NonFiniteLossError, match="finite loss of unlearning, but got .* a smaller `unlearning_lr`"):
        trainer().fit(RNP(small(), unlearning_lr=1e30, unlearned_accuracy=0.0), loader)


def test_statistics_and_weights_rest_until_the_masks_are_there(trainer):
    network, (_, (loader,)) = lively(small()), loaders(2)
    before = copy.deepcopy(network.state_dict())
    module = RNP(network, unlearning_rounds=1, lr=1e-9)  # no mask below 0.9
    trainer(max_epochs=2).fit(module, loader)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


class Told(nn.Module):
    """Class k where channel k of a BatchNorm is the largest; a further channel adds to nothing."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.norm.bias.data = torch.tensor([0.1, 0.2, 0.3, 0.1])  # else an image whose channel is gone is a tie

    def forward(self, images):
        return self.norm(images[:, 0, 0, :])[:, :3]


def decided(trainer, masks, **kwargs):
    """Which channels stay, where each of three classes has two held-out images and pruning one costs a third."""
    module = RNP(Told(), **kwargs)
    held_out = torch.zeros(6, 1, 1, 4)
    held_out[range(6), 0, 0, [0, 0, 1, 1, 2, 2]] = 1.0
    data = DataLoader(TensorDataset(held_out, torch.tensor([0, 0, 1, 1, 2, 2])), 4)
    train = DataLoader(TensorDataset(torch.rand(8, 1, 1, 4), torch.arange(8) % 3), 4)
    module.on_train_end, prune = lambda: None, module.prune

    def set_masks_and_prune():
        with torch.no_grad():
            module.masks[0].copy_(torch.tensor(masks))
        prune()
        return prune()  # once more is as once

    module.prune = set_masks_and_prune
    trainer(limit_val_batches=1.0).fit(module, train, data)
    assert torch.equal(module.model.norm.bias, Told().norm.bias)  # stays
    return (module.model.norm.weight != 0).tolist()


def test_rnp_prunes_up_to_the_highest_threshold_that_the_held_out_images_allow(trainer):
    assert decided(trainer, [0.2, 0.6, 0.95, 0.1], max_drop=0.0) == [True, True, True, False]
    assert decided(trainer, [0.2, 0.6, 0.95, 0.1], max_drop=0.4) == [False, True, True, False]
    assert decided(trainer, [0.2, 0.6, 0.95, 0.1], max_drop=1.0) == [False, False, True, False]  # 0.9 at most
    assert decided(trainer, [0.2, 0.6, 0.9, 0.1], max_drop=1.0) == [False] * 4  # up to and with the threshold
    assert decided(trainer, [0.0, 0.6, 0.95, 0.1], max_drop=0.0) == [True] * 4  # the first cut is too dear


@pytest.mark.parametrize(
    ("accuracies", "threshold"),
    [
        ([0.9] * 20, 0.9),
        ([0.9, 0.95, 0.9, 0.86, 0.85, *[0.9] * 15], 0.1),  # none behind a cut that is too dear
        ([0.9, 0.8, *[0.9] * 18], -1.0),
    ],
)
def test_the_threshold_is_the_last_before_the_first_that_costs_too_much(accuracies, threshold, trainer):
    module = ready(RNP(Told(), max_drop=0.045), trainer)
    module._accuracies = lambda loader: accuracies
    assert module._threshold() == threshold


def test_pruning_twice_is_pruning_once_and_masks_that_rise_bring_channels_back(trainer):
    network, (_, (loader,)) = lively(small()), loaders(2)
    module = RNP(network, unlearning_rounds=1, max_drop=1.0)
    trainer().fit(module, loader)
    with torch.no_grad():
        for mask in module.masks:
            mask.fill_(1.0)
        module.masks[0][1] = 0.3
    assert [module.prune(), module.prune()] == [1, 1]
    wanted = lively(small()).state_dict()
    wanted["block1.1.weight"][1] = 0.0
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())


def test_a_fit_that_goes_on_does_not_unlearn_again_and_prunes_the_suspicious_weights(trainer, tmp_path):
    (_, (loader,)), ascended = loaders(2), []

    def fit(epochs, **kwargs):
        module = RNP(lively(small()), unlearning_rounds=1, max_drop=1.0)
        ascend = module._ascend
        module._ascend = lambda *args: ascended.append(1) or ascend(*args)
        runner = trainer(max_epochs=epochs)
        runner.fit(module, loader, weights_only=True, **kwargs)
        return module, runner

    _, runner = fit(1)
    runner.save_checkpoint(tmp_path / "ended.ckpt")  # pruned at the end of the first epoch
    module, _ = fit(2, ckpt_path=tmp_path / "ended.ckpt")
    assert len(ascended) == 4
    wanted = lively(small()).get_parameter("block2.1.weight")
    with torch.no_grad():
        module.masks[1].fill_(1.0)
    module.prune()
    assert torch.equal(module.model.block2[1].weight, wanted)


def test_bad_arguments_of_rnp():
    with pytest.raises(ValueError, match="Expected `model` to be a network with BatchNorm layers that have weights"):
        RNP(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    for name, value, message in (
        ("unlearning_lr", 0.0, r"in \(0, inf\]"),
        ("unlearning_rounds", 0, "at least 1"),
        ("unlearned_accuracy", 1.5, r"in \[0, 1\]"),
        ("alpha", 0.0, r"in \(0, inf\]"),
        ("max_drop", -0.1, r"in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be {message}"):
            RNP(small(), **{name: value})
