"""Seeded order of samples, sharded over processes without counting anyone twice; a fit goes on within an epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nba_lightning.core.randomness import shuffled


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
        self.start = 0  # samples of this process that an interrupted epoch has had already

    def __iter__(self) -> Iterator[int]:
        """Positions of this process in this epoch."""
        length = len(self.dataset)  # type: ignore[arg-type]
        order = shuffled(length, self.seed, 2, self.epoch) if self.shuffle else torch.arange(length)
        if self.shuffle:
            order = order[: length - length % self.num_replicas]
        else:
            order = torch.cat([order, torch.full((-length % self.num_replicas,), -1)])
        return iter(order[self.rank :: self.num_replicas][self.start :].tolist())


class ResumableLoader(DataLoader[Any]):
    """A loader with a :class:`SeededSampler` that leaves out what an interrupted epoch has had before it was resumed.

    Nothing is drawn before the first batch is asked for: Lightning makes iterators early, before it knows where a fit
    goes on.

    Args:
        dataset: see :class:`torch.utils.data.DataLoader`.
        done: batches of the epoch at hand that were trained on before; asked once, when the first epoch begins;
            ``None`` for none.
        **kwargs: see :class:`torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Dataset[Any], done: Callable[[], int] | None = None, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.done = done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of this epoch, or of the rest of it."""
        # The Trainer may put another sampler in (`overfit_batches`), which knows no start.
        if isinstance(self.sampler, SeededSampler) and self.batch_size is not None:
            self.sampler.start = 0 if self.done is None else self.done() * self.batch_size
        self.done = None
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the Trainer saves how far an epoch got. Its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take over."""
