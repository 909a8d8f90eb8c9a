"""One fit: metered, and going on where it was killed."""

import argparse
import hashlib
import json
import shutil
from datetime import timedelta
from typing import Any

import torch
from common import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from meter import Meter, metered

from nba_lightning import BackdoorDataModule, Classifier
from nba_lightning.callbacks.finite_loss import NonFiniteLossError
from nba_lightning.io.checkpoints import SafeCheckpointIO


def fit_key(args: argparse.Namespace, module: Classifier, datamodule: BackdoorDataModule, settings: Any) -> str:
    """What tells a fit from others: its settings, images, precision and the first weights of all its networks."""
    partition = datamodule.partition
    key = hashlib.sha256(json.dumps([settings, args.precision, args.source], sort_keys=True).encode())
    for indices in (partition.clean, partition.poisoned) if datamodule.train_on == "clean" else (partition.training,):
        key.update(indices.numpy().tobytes())
    for network in module.networks():
        for value in network.state_dict().values():
            key.update(value.cpu().numpy().tobytes())
    return key.hexdigest()[:12]


def fit(
    args: argparse.Namespace,
    name: str,
    module: Classifier,
    datamodule: BackdoorDataModule,
    epochs: int,
    settings: Any,
    may_break_off: bool = False,
) -> Meter:
    """Fit ``module``, saving it every ``args.save_every`` seconds under ``args.work``, until it has ended.

    Args:
        args: what :func:`common.parser` gives.
        name: of the cell.
        module: what is fitted.
        datamodule: its images.
        epochs: how many.
        settings: of the module and the images, as JSON. A fit that was killed goes on only if these, the networks'
            first weights, the images, the precision and the source are the same.
        may_break_off: whether a loss that is not finite is a result, ``Meter.finite``, and no error.

    Returns:
        What it cost, the parts before it was killed included.
    """
    datamodule.setup()
    folder = args.work / "unfinished" / f"{name}-{fit_key(args, module, datamodule, [epochs, settings])}"
    saver = ModelCheckpoint(
        folder, "fit", train_time_interval=timedelta(seconds=args.save_every), enable_version_counter=False
    )
    saved = folder / "fit.ckpt"
    with metered(module) as meter:
        runner = trainer(
            args, epochs, callbacks=[meter, saver], enable_checkpointing=True, plugins=[SafeCheckpointIO()]
        )
        try:
            runner.fit(module, datamodule, ckpt_path=saved if saved.exists() else None)
        except NonFiniteLossError:
            if not may_break_off:
                raise
            meter.finite = False
    state = module.model.state_dict().values()
    meter.finite = meter.finite and all(bool(torch.isfinite(value).all()) for value in state)
    shutil.rmtree(folder, ignore_errors=True)
    return meter
