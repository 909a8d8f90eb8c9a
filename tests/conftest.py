import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Networks this small gain nothing from threads, which wait for one another where the machine does other work too.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from nba_lightning import BackdoorDataModule
from nba_lightning.attacks import BadNets
from nba_lightning.networks import SmallCNN


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(**kwargs: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**(defaults | kwargs))

    return make


@pytest.fixture
def network() -> SmallCNN:
    return SmallCNN(width=4, in_channels=1)


@pytest.fixture
def clean_digits() -> BackdoorDataModule:
    return BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=16)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two parts of two classes with four random images of 8x8 each."""
    generator = torch.Generator().manual_seed(0)
    root = tmp_path / "images"
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root
