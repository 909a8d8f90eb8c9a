"""Kill a fit with SIGKILL at random moments and resume it: the weights must be those of a fit that nobody killed.

    python benchmarks/resume.py --points 20

NBA on scikit-learn's digits: a fit of the teacher, then one of the student, a checkpoint every third step of each.
Each point is a moment drawn at random from the time that the uninterrupted chain takes, so it may lie in a step, in
crafting, in writing a checkpoint or between the fits. The chain is then started again; each fit goes on with
``ckpt_path="last"``, and one that had ended is loaded. CPU, bit by bit.
"""

import argparse
import copy
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

from nba_lightning import NBA, BackdoorDataModule, Defense, FineTuning
from nba_lightning.attacks import BadNets
from nba_lightning.callbacks import CleanedWeights
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.io.checkpoints import SafeCheckpointIO
from nba_lightning.networks import SmallCNN


def fit(module: Defense, folder: Path, epochs: int) -> Defense:
    """One link of the chain, which goes on from the last checkpoint in ``folder`` if there is one."""
    data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=10, augment=RandomCropFlip(1))
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, enable_version_counter=False)
    runner = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        plugins=[SafeCheckpointIO()],
        callbacks=[saver, CleanedWeights(str(folder / "cleaned.safetensors"))],
    )
    runner.fit(module, data, ckpt_path="last")
    return module


def child(folder: Path, kill: float | None) -> None:
    """The chain: a teacher, then the student."""
    quiet()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    if kill is not None:
        threading.Timer(kill, os.kill, (os.getpid(), signal.SIGKILL)).start()
    network = SmallCNN(width=4, in_channels=1)
    teacher = fit(FineTuning(copy.deepcopy(network)), folder / "teacher", 3)
    fit(NBA(network, teacher=teacher), folder / "student", 9)
    (folder / "seconds").write_text(str(time.perf_counter() - start))


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
        whole = load_file(root / "whole" / "student" / "cleaned.safetensors")
        seconds = float((root / "whole" / "seconds").read_text())
        for index in range(args.points):
            folder = root / str(index)
            while run(folder, moments.uniform(0, seconds)) == 0:  # it was faster this time: not killed at all
                folder = folder.with_name(folder.name + "again")
            saved = [folder / link / "last.ckpt" for link in ("teacher", "student")]
            steps = [torch.load(path, weights_only=True)["global_step"] if path.exists() else 0 for path in saved]
            run(folder)
            found = load_file(folder / "student" / "cleaned.safetensors")
            same = found.keys() == whole.keys() and all(torch.equal(value, found[key]) for key, value in whole.items())
            points.append({"resumed_from_steps": steps, "same": same})
            print(f"point {index}: resumed from steps {steps} (teacher, student), same weights: {same}", flush=True)
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
