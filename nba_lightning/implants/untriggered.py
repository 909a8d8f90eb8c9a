"""What modules share that train an attack: images as they are, with roles, and an attack that the DataModule keeps."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from nba_lightning.core.checks import expected
from nba_lightning.io.batches import Batch


def untriggered_roles(batch: Any, module: pl.LightningModule) -> Tensor:
    """The roles `(B,)` of a batch's images, which nobody has triggered.

    Raises:
        ValueError: if the batch has none, or the DataModule triggers its images.
    """
    train_on = getattr(getattr(module.trainer, "datamodule", None), "train_on", None)
    if not isinstance(batch, Batch) or batch.roles is None or train_on != "untriggered":
        raise expected("train_on", f"untriggered for {type(module).__name__}, which triggers images itself", train_on)
    return batch.roles


def without_attack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict without the attack that it took from the DataModule."""
    return {name: value for name, value in state.items() if not name.startswith("attack.")}
