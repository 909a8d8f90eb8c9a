"""Seeded order of samples, sharded over processes without counting anyone twice; batches that know their draw."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nba_lightning.core.randomness import shuffled
from nba_lightning.io.batches import Batch


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


class BatchLoader(DataLoader[Any]):
    """A loader that writes on each batch of :class:`~nba_lightning.data.dataset.Batches` which draw it is.

    It leaves out what an interrupted epoch has had before it was resumed. Nothing is drawn before the first batch is
    asked for: Lightning makes iterators early, before it knows where a fit goes on.

    Args:
        dataset: see :class:`torch.utils.data.DataLoader`.
        stage: ``"train"`` or ``"evaluate"``, as it will stand on each batch.
        done: batches of the epoch at hand that were trained on before; asked once, when the first epoch begins;
            ``None`` for none.
        **kwargs: see :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        stage: Literal["train", "evaluate"] = "evaluate",
        done: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.stage, self.done, self._passes = stage, done, 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of this epoch, or of the rest of it."""
        first, self.done = 0 if self.done is None else self.done(), None
        rank, epoch = 0, self._passes  # the Trainer may put another sampler in (`overfit_batches`), which knows neither
        if isinstance(self.sampler, SeededSampler) and self.batch_size is not None:
            self.sampler.start = first * self.batch_size
            rank, epoch = self.sampler.rank, self.sampler.epoch
        self._passes += 1
        for number, batch in enumerate(super().__iter__(), first):
            yield replace(batch, stage=self.stage, draw=(rank, epoch, number))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the Trainer saves how far an epoch got. Its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take over."""
