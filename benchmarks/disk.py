"""Epochs of large images from disk: our loader beside torchvision's ImageFolder, and memory over ten epochs.

    python benchmarks/disk.py                    # 2,000 JPEGs of 256 pixels, written under --work
    python benchmarks/disk.py --root DIR         # a folder of one's own, train/<class>/*.jpg and test/<class>/*.jpg

Both decode by Pillow in worker processes, crop and flip, and hand over float batches; there is no network, so an epoch
is the input alone. Ratios are taken over alternating epochs and go into ``results/disk.json``.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision.transforms as T
from common import provenance, quiet, spread, trainer, write
from meter import process_memory
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from nba_lightning import BackdoorDataModule
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.randomness import generator_for
from nba_lightning.data import ImageFolderSource

CLASSES = 10


def pictures(root: Path, number: int, side: int) -> Path:
    """Write JPEGs of smooth noise, which compress about as photographs do, unless they are there."""
    root = root / f"{number}-{side}"
    for part, share in (("train", number), ("test", CLASSES)):
        for index in range(share):
            path = root / part / f"class{index % CLASSES}" / f"{index}.jpg"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            small = torch.rand(3, side // 8, side // 8, generator=generator_for(index))
            large = torch.nn.functional.interpolate(small[None], size=(side, side), mode="bicubic")[0]
            grain = 0.05 * torch.randn(large.shape, generator=generator_for(index, 1))
            values = (255 * (large + grain).clamp(0.0, 1.0)).byte().permute(1, 2, 0).numpy()
            Image.fromarray(values).save(path, quality=90)
    return root


class Reading(pl.LightningModule):
    """Reads batches and notes seconds and the process's memory (MiB) after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def on_train_epoch_start(self) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.memory.append(process_memory())

    def configure_optimizers(self) -> None:
        return None


def ours(args: argparse.Namespace, epochs: int) -> Reading:
    """Epochs of a data module that reads a folder from disk."""
    data = BackdoorDataModule(
        ImageFolderSource(str(args.root), memory_limit_mib=0),
        None,
        augment=RandomCropFlip(padding=args.padding),
        batch_size=args.batch,
        num_workers=args.workers,
    )
    module = Reading()
    trainer(args, epochs).fit(module, datamodule=data)
    module.seconds = [seconds / len(data.partition.training) for seconds in module.seconds]
    return module


def theirs(args: argparse.Namespace, epochs: int) -> Reading:
    """The same number of epochs of ImageFolder under the same Trainer."""
    side = Image.open(next((args.root / "train").glob("*/*"))).size[0]
    steps = [T.RandomCrop(side, padding=args.padding), T.RandomHorizontalFlip(), T.ToTensor()]
    pictures = ImageFolder(str(args.root / "train"), T.Compose(steps))
    options = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    module = Reading()
    trainer(args, epochs).fit(module, DataLoader(pictures, args.batch, shuffle=True, drop_last=True, **options))
    module.seconds = [seconds / len(pictures) for seconds in module.seconds]
    return module


def growth(module: Reading) -> dict[str, Any]:
    """Memory of the main process after each epoch, and what it grew from the second to the last."""
    return {"mib": [round(value) for value in module.memory], "grew": round(module.memory[-1] - module.memory[1])}


def main() -> None:
    quiet()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--root", type=Path, help="a folder of images instead of written ones")
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--side", type=int, default=256)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--padding", type=int, default=28, help="of the crop")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--epochs", type=int, default=10, help="of the fit whose memory is watched; at least 2")
    options.add_argument("--work", type=Path, default=Path("runs/benchmark"))
    options.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "disk.json")
    args = options.parse_args()
    args.network, args.precision, args.jobs = "none", "32-true", 1
    args.root = args.root or pictures(args.work / "pictures", args.images, args.side)
    args.source = f"JPEGs of {args.side} pixels, {args.workers} workers"
    run: dict[str, Callable[[argparse.Namespace, int], Reading]] = {"ours": ours, "image_folder": theirs}
    watched = {name: growth(epochs(args, args.epochs)) for name, epochs in run.items()}
    # The first epoch starts the workers; of two the second is timed.
    pairs = [(theirs(args, 2).seconds[1], ours(args, 2).seconds[1]) for _ in range(args.rounds)]
    result = {"image_folder_over_ours": spread([first / second for first, second in pairs]), "memory": watched}
    result |= {"images_per_second": round(1 / min(second for _, second in pairs)), **provenance(args)}
    write(args.result, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
