"""Fine-pruning against independent formulations."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import BackdoorDataModule, FinePruning
from nba_lightning.attacks import BadNets
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.defenses import fine_pruning
from nba_lightning.defenses.fine_pruning import keep_mask
from tests.helpers import Spy, batch, cross_entropy, lively, ready


def test_features_are_cut_as_long_as_accuracy_allows():
    linear = nn.Linear(4, 4, bias=False)
    nn.init.eye_(linear.weight)
    features, labels = torch.eye(4).repeat_interleave(5, dim=0), torch.arange(4).repeat_interleave(5)
    padded = torch.cat([features, torch.ones(3, 4)]), torch.cat([labels, torch.full((3,), -1)])
    # Without input k, the five images of class k have equal logits and go to class 0.
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=0.0).tolist() == [1, 1, 1, 1]
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=0.25).tolist() == [1, 1, 1, 0]
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=0.5).tolist() == [1, 1, 0, 0]
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=1.0).tolist() == [1, 0, 0, 0]


def test_fine_pruning_cuts_the_sleeping_feature_and_keeps_it_cut(network, trainer, clean_digits):
    norm = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0.0, -1.0  # asleep under a ReLU
    module = FinePruning(network, max_drop=1.0)
    trainer(max_epochs=2).fit(module, clean_digits)
    assert module.kept[5] == 0
    assert module.kept.sum() == 1  # all accuracy may go, so the liveliest stays alone
    assert (network.fc.weight[:, module.kept == 0] == 0).all()
    with pytest.raises(ValueError, match="Expected `model` to be a network with a linear layer"):
        FinePruning(nn.Conv2d(1, 10, 8))


class WithAuxiliary(nn.Module):
    """A second classifier, which only training asks, is registered behind the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body, self.fc, self.aux = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), nn.Linear(6, 10), nn.Linear(6, 10)

    def forward(self, images):
        features = self.body(images)
        return self.fc(features) if not self.training else self.fc(features) + 0 * self.aux(features)


def test_fine_pruning_prunes_the_layer_that_gives_the_logits_or_none(trainer, clean_digits):
    with pytest.raises(ValueError, match="Expected `head` to be the linear layer whose output is the network's, but g"):
        trainer().fit(FinePruning(WithAuxiliary()), clean_digits)
    module = FinePruning(WithAuxiliary(), head="fc", max_drop=1.0)
    trainer().fit(module, clean_digits)
    assert module.kept.sum() == 1
    assert (module.model.fc.weight[:, module.kept == 0] == 0).all()
    with pytest.raises(ValueError, match="`head` to be the path of a linear layer"):
        FinePruning(WithAuxiliary(), head="body")


class Look(nn.Module):
    """A network whose features take both signs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh())
        self.fc = nn.Linear(6, 10)

    def forward(self, images):
        return self.fc(self.body(images))


def spied(monkeypatch):
    calls = []

    def spy(linear, features, labels, order, drop):
        calls.append((features.clone(), labels.clone(), list(map(int, order)), drop))
        return torch.ones(linear.in_features)

    monkeypatch.setattr(fine_pruning, "keep_mask", spy)
    return calls


def test_fine_pruning_ranks_by_training_images_and_decides_by_held_out_ones(trainer, monkeypatch):
    network, calls = Look(), spied(monkeypatch)
    sets = [TensorDataset(*batch(12)), TensorDataset(*batch(9))]
    module = FinePruning(copy.deepcopy(network), max_drop=0.07)
    trainer().fit(module, DataLoader(sets[0], 4), DataLoader(sets[1], 4))
    (features, labels, order, drop), *others = calls
    assert not others  # once in a fit
    torch.testing.assert_close(features, network.body(sets[1].tensors[0]))
    assert torch.equal(labels, sets[1].tensors[1])
    strengths = [sum(abs(float(one[k])) for one in network.body(sets[0].tensors[0]).detach()) / 12 for k in range(6)]
    assert order == sorted(range(6), key=strengths.__getitem__)  # the most dormant first
    assert drop == 0.07


def test_fine_pruning_ranks_by_images_that_are_not_augmented(trainer, monkeypatch):
    network, calls = Look(), spied(monkeypatch)
    data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=60, augment=RandomCropFlip(3))
    module = FinePruning(copy.deepcopy(network))
    trainer().fit(module, data)
    images = data.source.load()[0].read(data.partition.clean).float() / 255
    assert len(images) == 60  # one batch, so an epoch has them all
    strengths = network.body(images).detach().abs().mean(dim=0)
    assert calls[0][2] == strengths.argsort().tolist()


def test_fine_pruning_looks_at_features_in_eval_mode_and_at_accuracy_as_it_is(network, trainer):
    module = ready(FinePruning(Spy(lively(network))), trainer).train()
    images, labels = batch()
    features, found = module._features([(images, labels)])
    assert module.model.modes == [{False}, {False}]  # the first pass looks for the head
    assert {layer.training for layer in network.modules()} == {True}
    assert torch.equal(found, labels)
    network.eval()
    torch.testing.assert_close(network.fc(features), network(images))


def test_fine_pruning_stops_at_the_first_cut_that_costs_too_much():
    linear = nn.Linear(3, 3, bias=False)
    nn.init.eye_(linear.weight)
    features, labels = torch.eye(3).repeat_interleave(2, dim=0), torch.arange(3).repeat_interleave(2)
    features[:, 0] = 0.0  # never fires: cutting it costs nothing
    kept = keep_mask(linear, features, labels, torch.tensor([2, 0, 1]), drop=0.1)
    assert kept.tolist() == [1, 1, 1]  # not [0, 1, 1]: behind a cut that costs too much none is tried


def test_fine_pruning_s_loss_is_the_cross_entropy_of_the_cut_network(network, trainer):
    module = ready(FinePruning(lively(network)), trainer).train()
    module.kept[3:] = 0.0
    module._cut()
    images, labels = batch()
    by_hand = copy.deepcopy(network)
    by_hand.fc.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (torch.arange(16) < 3),))
    torch.testing.assert_close(module.training_step((images, labels), 1), cross_entropy(by_hand(images), labels))


def test_fine_pruning_decides_by_the_images_of_all_processes(network, trainer):
    module = ready(FinePruning(network), trainer)
    images, labels = batch()
    alone, _ = module._features([(images, labels)])
    module.all_gather = lambda parts: tuple(torch.stack([part, part + 1]) for part in parts)
    features, truths = module._features([(images, labels)])
    torch.testing.assert_close(features, torch.cat([alone, alone + 1]))
    assert torch.equal(truths, torch.cat([labels, labels + 1]))
