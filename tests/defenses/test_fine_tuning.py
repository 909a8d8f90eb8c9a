"""Fine-tuning against stochastic gradient descent by hand."""

import copy
import math

import torch
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import FineTuning
from tests.helpers import batch, cross_entropy, lively, ready


def test_the_loss_is_the_cross_entropy(network, trainer):
    module = ready(FineTuning(lively(network)), trainer).train()
    images, labels = batch()
    torch.testing.assert_close(module.training_step((images, labels), 1), cross_entropy(network(images), labels))


def test_a_fit_is_sgd_with_nesterov_momentum_weight_decay_and_a_cosine(network, trainer):
    """Four steps; Nesterov momentum as in Sutskever et al., ICML 2013, in PyTorch's form."""
    images, labels = batch(24)
    by_hand, rate, momentum, decay = copy.deepcopy(network).train(), 0.05, 0.8, 0.01
    module = FineTuning(network, lr=rate, momentum=momentum, weight_decay=decay)
    trainer().fit(module, DataLoader(TensorDataset(images, labels), 6))
    velocity = {name: torch.zeros_like(value) for name, value in by_hand.named_parameters()}
    for step in range(4):
        rows = slice(6 * step, 6 * step + 6)
        weights = dict(by_hand.named_parameters())
        gradients = torch.autograd.grad(cross_entropy(by_hand(images[rows]), labels[rows]), list(weights.values()))
        factor = (1 + math.cos(math.pi * step / 4)) / 2
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                slope = gradient + decay * weight
                velocity[name] = momentum * velocity[name] + slope
                weight.sub_(factor * rate * (slope + momentum * velocity[name]))
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, atol=1e-5, rtol=1e-4)
