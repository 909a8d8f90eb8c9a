"""Seeded randomness without global state: every draw is a function of the integers that name it."""

import torch
from torch import Tensor


def generator_for(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on all ``keys`` (a seed, an epoch, a batch index, a rank, ...) in order."""
    mixed = 0
    for key in keys:
        mixed = ((mixed ^ (key & 0xFFFFFFFF)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def shuffled(length: int, *keys: int) -> Tensor:
    """A permutation `(length,)` of 0 to length - 1 that depends on ``keys`` alone."""
    return torch.randperm(length, generator=generator_for(*keys))
