"""Perturbations of features: how they are crafted, and which images carry them."""

import copy
from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import FineTuning
from nba_lightning.core.features import features, predict
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import LatentPerturbations
from tests.helpers import batch, lively, ready


class Plain(nn.Module):
    """Features are the image, and again behind an affine map; the head is linear."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Identity(), nn.Conv2d(1, 2, 1)
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        return self.fc(self.second(self.first(images)).flatten(1))


def crafted(network, images, seed=0, **kwargs):
    made = LatentPerturbations(**kwargs)
    made.regenerate(network, repeat(images), torch.Generator().manual_seed(seed))
    return made


def rms(rows):
    return rows.flatten(1).square().mean(dim=1).sqrt()


def answers(network, made, layer, images, factor=1.0):
    """Each class, and the logits of all images under its perturbation of a layer, times a factor."""
    for number, row in enumerate(made.banks[layer]):
        handle = network.get_submodule(layer).register_forward_hook(lambda _, __, found, row=row: found + factor * row)
        yield number, network(images)
        handle.remove()


def away(*args):
    """Cross-entropy of each class under its own perturbation."""
    found = [F.cross_entropy(logits, torch.full((len(logits),), number)) for number, logits in answers(*args)]
    return torch.stack(found)


def won(*args):
    """Share of the images that each perturbation brings to its class."""
    return torch.stack([(logits.argmax(dim=1) == number).float().mean() for number, logits in answers(*args)])


@pytest.mark.parametrize("layer", ["block1", "block2"])
def test_each_perturbation_leads_to_its_class_within_the_bound(layer, network):
    network, images = lively(network).eval(), torch.rand(64, 1, 8, 8)
    made = crafted(network, images, size=1.0, steps=16)
    assert list(made.banks) == ["block1", "block2"]
    bank, found = made.banks[layer], features(network, images, [layer])[1][layer]
    assert bank.shape == (10, *found.shape[1:])
    assert rms(bank).max() <= found.square().mean().sqrt() * 1.001
    assert (away(network, made, layer, images) < away(network, made, layer, images, 0.0) - 0.1).all()


def test_steps_go_along_the_gradient_by_hand():
    """Two steps on one image, so that no draw of images is in it."""
    network, images, size = Plain(), torch.rand(1, 1, 2, 2), 0.5
    made = crafted(network, images, layers=["second"], size=size, steps=2, images_each=4)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(3, generator=generator)  # the classes
    bank = torch.randn(3, 2, 2, 2, generator=generator)
    maps = network.second(images)
    bound = size * maps.square().mean().sqrt().item()
    bank *= (0.1 * bound / rms(bank)).view(3, 1, 1, 1)
    for _ in range(2):
        leaf = bank.clone().requires_grad_()
        loss = F.cross_entropy(network.fc((maps + leaf).flatten(1)), torch.arange(3), reduction="sum")
        gradient = torch.autograd.grad(loss, leaf)[0]
        bank = bank - (1.25 * bound / rms(gradient)).view(3, 1, 1, 1) * gradient
        bank = bank * (bound / rms(bank)).clamp(max=1).view(3, 1, 1, 1)
    torch.testing.assert_close(made.banks["second"], bank, rtol=1e-4, atol=1e-5)


def test_the_bound_is_that_of_the_network_as_it_came():
    network, images = Plain(), torch.rand(6, 1, 2, 2)
    made = crafted(network, images, layers=["second"], steps=8)
    before = rms(made.banks["second"]).max()
    with torch.no_grad():
        network.second.weight.mul_(10)
        network.second.bias.mul_(10)
    made.regenerate(network, repeat(images), torch.Generator().manual_seed(1))
    torch.testing.assert_close(rms(made.banks["second"]).max(), before, rtol=0.01, atol=0)
    again = LatentPerturbations(["second"], steps=8)
    again.set_extra_state(made.get_extra_state())
    again.regenerate(network, repeat(images), torch.Generator().manual_seed(1))
    assert torch.equal(again.banks["second"], made.banks["second"])


def test_the_last_images_carry_them_and_layers_take_turns():
    network, images = Plain(), torch.rand(6, 1, 2, 2)
    made = crafted(network, images, layers=["first", "second"])
    plain = network(images)
    for turn, layer in enumerate(["first", "second", "first"]):
        with made.within(network, 0.5, turn, torch.Generator().manual_seed(turn)):
            found = network(images)
        rows = torch.randint(3, (3,), generator=torch.Generator().manual_seed(turn))
        assert torch.equal(found[:3], plain[:3])
        if layer == "first":
            inputs = network.second(images[3:] + made.banks["first"][rows])
        else:
            inputs = network.second(images[3:]) + made.banks["second"][rows]
        torch.testing.assert_close(found[3:], network.fc(inputs.flatten(1)))
    assert torch.equal(network(images), plain)


def test_of_many_classes_some_are_taken_each_time():
    network, images = Plain(classes=40), torch.rand(6, 1, 2, 2)
    made = LatentPerturbations(["first"], classes=5, size=4.0, steps=8)
    for seed in range(3):
        made.regenerate(network, repeat(images), torch.Generator().manual_seed(seed))
        classes = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:5].sort().values
        rows = zip(made.banks["first"], classes.unsqueeze(1).expand(5, 6), strict=True)
        gained = [F.cross_entropy(network(images), of) - F.cross_entropy(network(images + row), of) for row, of in rows]
        assert torch.stack(gained).mean() > 0.5


def test_the_network_stays_as_it_is(network):
    network = lively(network).train()
    before = copy.deepcopy(network.state_dict())
    crafted(network, torch.rand(8, 1, 8, 8))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_bad_arguments_and_too_early_a_use_are_named(network):
    with pytest.raises(ValueError, match="Expected `size` to be"):
        LatentPerturbations(size=0.0)
    with pytest.raises(ValueError, match="Expected `steps` to be"):
        LatentPerturbations(steps=0)
    with pytest.raises(ValueError, match="Expected `layers` to be at least one layer"):
        LatentPerturbations([])
    with pytest.raises(ValueError, match="Expected `layers` to be names of layers of SmallCNN"):
        FineTuning(network, latent=LatentPerturbations(["nowhere"]))
    with pytest.raises(ValueError, match="Expected `latent_share` to be"):
        FineTuning(network, latent=LatentPerturbations(), latent_share=1.5)
    with pytest.raises(RuntimeError, match="Call `regenerate`"):
        LatentPerturbations().within(network, 0.5, 0)


def test_the_loss_of_fine_tuning_is_that_of_perturbed_features(network, trainer):
    module = ready(FineTuning(lively(network), latent=LatentPerturbations(), latent_share=1.0), trainer).train()
    images, labels = batch()
    module.latent.banks = {"block1": torch.full((1, 4, 8, 8), 0.7)}
    loss = module.training_step((images, labels), 1)
    x = network.normalize(images)
    maps = network.block2(F.max_pool2d(network.block1(x) + 0.7, 2))
    by_hand = network.fc(network.block3(F.max_pool2d(maps, 2)).mean(dim=(2, 3)))
    torch.testing.assert_close(loss, F.cross_entropy(by_hand, labels))


def test_a_share_of_zero_is_plain_fine_tuning(network, trainer):
    data = DataLoader(TensorDataset(*batch(16)), 8)
    weights = []
    for latent in (None, LatentPerturbations()):
        module = FineTuning(copy.deepcopy(network), latent=latent, latent_share=0.0)
        trainer().fit(module, data)
        weights.append(predict(module.model.eval(), torch.ones(1, 1, 8, 8)))
    assert torch.equal(*weights)


def test_one_object_serves_several_networks(clean_digits, trainer):
    """Also of other widths, and with no bound of an earlier one."""
    shared, scales = LatentPerturbations(steps=1), []
    for width, size in ((4, 1.0), (6, 100.0)):
        network = lively(SmallCNN(width=width, in_channels=1))
        network.block1[1].weight.data *= size
        trainer(max_epochs=1).fit(FineTuning(network, latent=shared), clean_digits)
        assert shared.banks["block1"].shape == (10, width, 8, 8)
        scales.append(float(shared.scales["block1"]))
    assert scales[1] > 10 * scales[0]


def test_a_fit_unlearns_what_leads_to_a_class(network, clean_digits, trainer):
    """More than the same fit without; asked by perturbations that neither fit saw."""
    trainer(max_epochs=20).fit(FineTuning(network, lr=0.05), clean_digits)
    clean_digits.setup("fit")
    images = torch.cat([item.images for item in clean_digits.train_dataloader()]).float() / 255
    left = []
    for share in (0.0, 0.5):
        module = FineTuning(copy.deepcopy(network), lr=0.05, latent=LatentPerturbations(), latent_share=share)
        trainer(max_epochs=20).fit(module, clean_digits)
        fresh = crafted(module.model.eval(), images, seed=7, size=0.3)
        left.append(torch.stack([won(module.model, fresh, layer, images) for layer in fresh.banks]).mean())
    assert left[1] < 0.7 * left[0]
