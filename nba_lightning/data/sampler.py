"""Seeded order of samples, sharded over processes without counting anyone twice."""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, DistributedSampler

from nba_lightning.randomness import shuffled


class SeededSampler(DistributedSampler[int]):
    """Order of epoch e from ``(seed, e)`` alone, the same whatever was drawn before.

    Training (``shuffle``) drops the few last samples that do not divide among the processes. Evaluation pads with
    index -1, which :class:`~nba_lightning.data.dataset.Batches` marks as not to be counted. A subclass of
    ``DistributedSampler``, so Lightning leaves it in place and sets its epoch.

    Args:
        dataset: what is sampled.
        shuffle: a new order each epoch.
        seed: seed of the order.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, dataset: Dataset[object], shuffle: bool, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=shuffle)

    def __iter__(self) -> Iterator[int]:
        """Positions of this process in this epoch."""
        length = len(self.dataset)  # type: ignore[arg-type]
        order = shuffled(length, self.seed, 2, self.epoch) if self.shuffle else torch.arange(length)
        if self.shuffle:
            order = order[: length - length % self.num_replicas]
        else:
            order = torch.cat([order, torch.full((-length % self.num_replicas,), -1)])
        return iter(order[self.rank :: self.num_replicas].tolist())
