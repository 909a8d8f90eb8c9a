"""Kill a fit with SIGKILL at random moments and resume it: the weights must be those of a fit that nobody killed.

    python benchmarks/resume.py --points 20

NBA on scikit-learn's digits, teacher and student, a checkpoint every third step. Each point is a moment drawn at random
from the time that the uninterrupted fit takes, so it may lie in a step, in crafting, or in writing a checkpoint. The
fit is then started again with ``ckpt_path="last"`` until it ends. CPU, bit by bit.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from common import quiet
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from nba_lightning import NBA, BackdoorDataModule
from nba_lightning.attacks import BadNets
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.io.checkpoints import SafeCheckpointIO
from nba_lightning.networks import SmallCNN


class Killer(pl.Callback):
    """SIGKILL after some seconds of training."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


class Clock(pl.Callback):
    """Write down how long training took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (self.folder / "seconds").write_text(str(time.perf_counter() - self.start))


def child(folder: Path, kill: float | None) -> None:
    """One fit, which goes on from the last checkpoint in ``folder`` if there is one."""
    quiet()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = NBA(SmallCNN(width=4, in_channels=1), teacher_epochs=3)
    data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=10, augment=RandomCropFlip(1))
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, enable_version_counter=False)
    runner = pl.Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        plugins=[SafeCheckpointIO()],
        callbacks=[saver, Clock(folder), *([] if kill is None else [Killer(kill)])],
    )
    runner.fit(module, data, ckpt_path="last")


def run(folder: Path, kill: float | None = None) -> int:
    """A fit in a process of its own; its exit status, -9 where it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", str(folder), *([] if kill is None else ["--kill", str(kill)])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"A fit failed:\n{ran.stderr[-3000:]}")
    return ran.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "resume.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child, args.kill)
        return
    moments = random.Random(args.seed)
    points = []
    with TemporaryDirectory() as name:
        root = Path(name)
        run(root / "whole")
        whole = load_file(root / "whole" / "cleaned.safetensors")
        seconds = float((root / "whole" / "seconds").read_text())
        for index in range(args.points):
            folder = root / str(index)
            while run(folder, moments.uniform(0, seconds)) == 0:  # it was faster this time: not killed at all
                folder = folder.with_name(folder.name + "again")
            saved = torch.load(folder / "last.ckpt", weights_only=True) if (folder / "last.ckpt").exists() else {}
            run(folder)
            found = load_file(folder / "cleaned.safetensors")
            same = found.keys() == whole.keys() and all(torch.equal(value, found[key]) for key, value in whole.items())
            points.append({"resumed_from_step": saved.get("global_step", 0), "same": same})
            print(
                f"point {index}: resumed from step {points[-1]['resumed_from_step']}, same weights: {same}", flush=True
            )
    result = {
        "points": points,
        "same": sum(point["same"] for point in points),
        "n": len(points),
        "seed": args.seed,
        "versions": {"torch": torch.__version__, "lightning": pl.__version__, "python": platform.python_version()},
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if result["same"] == result["n"] else f"{result['n'] - result['same']} points differ.")


if __name__ == "__main__":
    main()
