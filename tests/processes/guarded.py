"""What one process of several does for the guard's test.

torchrun --standalone --nproc-per-node 2 -m tests.processes.guarded FOLDER
"""

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from nba_lightning import BackdoorDataModule, FineTuning
from nba_lightning.callbacks import Guard
from nba_lightning.networks import SmallCNN
from tests.callbacks.test_guard import Brightest, loader


def figures(module, folder, *data):
    guard = Guard()
    runner = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[guard],
    )
    runner.fit(module, *data)
    return vars(guard.accuracies["student"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    digits = BackdoorDataModule(train_on="clean", clean_fraction=0.06, validation_fraction=0.8, batch_size=2)
    found = {
        "ours": figures(FineTuning(SmallCNN(width=2, in_channels=1), lr=0.01), folder, digits),
        "theirs": figures(FineTuning(Brightest(), lr=0.01), folder, loader(16), loader(61)),
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
