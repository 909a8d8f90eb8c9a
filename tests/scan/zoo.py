"""Networks with known answers, and real ones with a planted backdoor."""

import torch
from torch import nn

from nba_lightning import Classifier
from nba_lightning.networks import SmallCNN


class PixelGroups(nn.Module):
    """Logit k is ``gains[k]`` times the mean of image row k: its largest margin is ``gains[k]``."""

    def __init__(self, gains):
        super().__init__()
        self.fc = nn.Linear(len(gains) * 4, len(gains))
        weight = torch.zeros(len(gains), len(gains), 4)
        for k, gain in enumerate(gains):
            weight[k, k] = gain / 4
        self.fc.weight.data, self.fc.bias.data = weight.flatten(1), torch.zeros(len(gains))

    def forward(self, images):
        return self.fc(images.flatten(1))


def planted(data, trainer, seed=0, epochs=8):
    """A SmallCNN trained on what the DataModule yields."""
    torch.manual_seed(seed)
    module = Classifier(SmallCNN(in_channels=1), lr=0.1, seed=seed)
    trainer(max_epochs=epochs).fit(module, data)
    return module.model.eval()


def snapshot(network):
    """All that a scan must leave alone."""
    return {
        "state": {name: value.clone() for name, value in network.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()},
        "needs": {name: p.requires_grad for name, p in network.named_parameters()},
        "modes": {name: module.training for name, module in network.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in network.named_modules()},
        "random": torch.random.get_rng_state(),
    }


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
