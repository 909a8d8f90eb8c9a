"""Every attack on tiny images, ready to trigger: what the contract tests walk over."""

import torch

from nba_lightning.attacks import Attack
from nba_lightning.networks import SmallCNN


def subclasses(cls):
    return {found for child in cls.__subclasses__() for found in (child, *subclasses(child))}


ATTACKS = sorted(
    (cls for cls in subclasses(Attack) if cls.__module__.startswith("nba_lightning") and not cls.__abstractmethods__),
    key=lambda cls: cls.__name__,
)


class TinySet:
    """Random images of ten classes in turn."""

    def __init__(self, shape, length=60):
        self.images = torch.randint(0, 256, (length, *shape), dtype=torch.uint8)
        self.labels = torch.arange(length) % 10

    def read(self, indices):
        return self.images[indices]


def arguments(attack_class, channels):
    """What an attack needs beside its defaults: a surrogate, and few steps."""
    if attack_class.__name__ not in ("SCAR", "Grond", "LC", "TrojanNN"):
        return {}
    torch.manual_seed(1)
    return {"surrogate": SmallCNN(width=4, in_channels=channels), "steps": 3}


def compute(attack, data, poisoned=(3, 13, 23)):
    """Compute on all but the last ten images, which are the defender's."""
    attack.compute(data, torch.arange(len(data.labels) - 10), torch.tensor(poisoned), torch.device("cpu"))


def build(attack_class, shape=(1, 8, 8), **kwargs):
    """A prepared attack with its networks, if any, at their random start."""
    torch.manual_seed(2)
    attack = attack_class(**(arguments(attack_class, shape[0]) | kwargs))
    attack.prepare(shape, 10)
    if attack_class.__name__ in ("InputAware", "SSBA"):
        attack.ready = True
    torch.manual_seed(3)
    compute(attack, TinySet(shape))
    return attack
