"""FST against independent formulations."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import FST
from nba_lightning.core.randomness import generator_for
from nba_lightning.training import redrawn_head
from tests.helpers import batch, cross_entropy, lively, ready, small


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def steps_by_hand(network, batches, initial, loss, lr, momentum=0.9):
    """Momentum SGD from the definition; the last layer is brought back to its norm after each step."""
    velocity = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    for images, labels in batches:
        network.zero_grad()
        loss(network(images), labels, network.fc.weight).backward()
        with torch.no_grad():
            for name, value in network.named_parameters():
                velocity[name] = momentum * velocity[name] + value.grad
                value.sub_(lr * velocity[name])
            lengths = [sum(float(one) ** 2 for one in weight.flatten()) for weight in (network.fc.weight, initial)]
            network.fc.weight *= (lengths[1] / lengths[0]) ** 0.5


def fitted(module, trainer, batches):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    trainer().fit(module, DataLoader(TensorDataset(images, labels), len(batches[0][1])))


def test_fst_s_steps_are_the_equation(trainer):
    network, batches = lively(small()), [batch(8) for _ in range(3)]
    initial = network.fc.weight.detach().clone()
    by_hand = copy.deepcopy(network).train()
    generator = generator_for(3, 10)
    with torch.no_grad():  # 16 features: -1/4 to 1/4
        by_hand.fc.weight.copy_(torch.rand(10, 16, generator=generator) / 2 - 0.25)
        by_hand.fc.bias.copy_(torch.rand(10, generator=generator) / 2 - 0.25)

    def loss(logits, labels, weight):
        product = sum(float(old) * new for new, old in zip(weight.flatten(), initial.flatten(), strict=True))
        return cross_entropy(logits, labels) + 0.3 * product

    steps_by_hand(by_hand, batches, initial, loss, lr=0.05)
    fitted(FST(network, alpha=0.3, lr=0.05, seed=3, scheduler=constant), trainer, batches)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_fst_turns_the_last_layer_away_at_its_norm(trainer):
    network, batches = small(), [batch(8) for _ in range(20)]
    initial = network.fc.weight.detach().clone()
    fitted(FST(network, alpha=1.0, lr=0.1, scheduler=constant), trainer, batches)
    weight = network.fc.weight.detach()
    torch.testing.assert_close(weight.norm(), initial.norm())
    assert torch.cosine_similarity(weight.flatten(), initial.flatten(), dim=0) < -0.9


def test_the_last_layer_is_drawn_once_by_its_seed_and_never_scaled_before_the_first_step(trainer):
    drawn = []
    for seed in (0, 0, 1):
        module = ready(FST(small(), seed=seed), trainer).train()
        module.training_step(batch(), 1)
        drawn.append(module.layer().weight.detach().clone())
        module.training_step(batch(), 2)
        assert torch.equal(module.layer().weight, drawn[-1])
        assert torch.equal(module.initial, small().fc.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 0.25 < 1.1 * drawn[0].abs().max()


def test_the_suspicious_network_is_looked_at_before_its_last_layer_is_drawn(trainer, monkeypatch):
    network, seen = lively(small()), []
    images, labels = batch(16)
    wanted = copy.deepcopy(network).eval()(images)
    monkeypatch.setattr(FST, "look_at_first_answers", lambda self, logits, labels: seen.append(logits))
    fitted(FST(network), trainer, [(images, labels)])
    torch.testing.assert_close(seen, [wanted])


def test_half_precision_sees_the_last_layer_that_was_drawn(trainer):
    module = ready(FST(lively(small()), alpha=0.0), trainer).train()
    images, labels = batch(8)
    module.trainer.fit_loop.epoch_loop.batch_progress.reset()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step((images, labels), 0)  # looks at the answers of the old layer first
        torch.clear_autocast_cache()
        again = nn.functional.cross_entropy(module.model(images), labels)
    torch.testing.assert_close(loss, again)


def test_networks_that_fst_cannot_take_are_named(trainer):
    step = batch(), 1
    with pytest.raises(ValueError, match="`model` to be a network with a linear layer, but got Conv2d"):
        FST(nn.Conv2d(1, 10, 8))
    with pytest.raises(ValueError, match="`head` to be the path of a linear layer, but got 'linear'. There are: fc"):
        FST(small(), head="linear")
    with pytest.raises(ValueError, match="Expected `alpha` to be at least 0, but got -1"):
        FST(small(), alpha=-1)
    with pytest.raises(ValueError, match="`model` to be one that ends in a linear layer, but got Sequential"):
        ready(FST(nn.Sequential(small(), nn.ReLU())), trainer).training_step(*step)
    frozen, empty, computed = small(), small(), small()
    frozen.fc.requires_grad_(False)
    nn.init.zeros_(empty.fc.weight)
    nn.utils.parametrizations.weight_norm(computed.fc)
    for network in (frozen, computed):
        with pytest.raises(ValueError, match="network whose last layer trains, but got one whose 'fc' has a weight"):
            ready(FST(network), trainer).training_step(*step)
    with pytest.raises(ValueError, match="whose last layer has a weight other than 0, but got 0 in 'fc'"):
        ready(FST(empty), trainer).training_step(*step)


def test_a_search_for_a_rate_leaves_the_last_layer_to_be_drawn_again(trainer):
    module, before, begun = ready(FST(small()), trainer), {}, {}
    module.on_save_checkpoint(before)  # as a tuner does before its trial steps
    module.training_step(batch(), 1)
    module.on_save_checkpoint(begun)
    module.on_load_checkpoint(before)
    assert not len(module.initial)
    module.on_load_checkpoint(begun)
    assert torch.equal(module.initial, small().fc.weight)


def test_few_images_and_few_classes_will_do(trainer):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    images = torch.rand(3, 1, 8, 8)
    initial = network[1].weight.detach().clone()
    trainer(max_epochs=2).fit(FST(network), DataLoader(TensorDataset(images, torch.tensor([0, 1, 1])), 16))
    torch.testing.assert_close(network[1].weight.norm(), initial.norm())


def test_rescaling_keeps_the_direction():
    weight, like = torch.randn(4, 3), torch.randn(2, 5)
    scaled = weight.clone()
    redrawn_head.rescale(scaled, like)
    torch.testing.assert_close(scaled / weight, torch.full_like(weight, float(scaled[0, 0] / weight[0, 0])))
    torch.testing.assert_close(scaled.square().sum(), like.square().sum())
