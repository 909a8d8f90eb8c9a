"""Training loops of two public code bases beside ours, from clones that you have: ratios, each within one run.

    git clone https://github.com/bboylyg/NAD
    git clone https://github.com/SCLBD/BackdoorBench
    python benchmarks/peers.py --nad NAD --backdoorbench BackdoorBench

Time per image, theirs over ours: above 1 ours is faster. Mean and sample standard deviation over ``--rounds``
alternating rounds; each ratio goes into ``results/peers.json`` when it is there. Random images of CIFAR-10's shape in
memory, float32 on one thread of the CPU, batches of 64, BadNets unless said otherwise; ``peers_nad.py`` and
``peers_backdoorbench.py`` say which functions of theirs run. Their code is executed as it is in the folders that you
name, so read it first; no file of theirs is loaded.

What is timed is the loop of an epoch or an evaluation: building loaders and the Trainer is left out on both sides.

What could not be matched:

- The networks are WideResNet-16-1 on both sides. NAD brings its own, without normalisation, where ours begins with it.
  BackdoorBench's loop gets ours without it, since its loader normalises; its PreActResNet-18 lacks the last BatchNorm.
- Both trigger BadNets and Blended images before training, which is not timed, where ours does so in every batch; and
  poisoned images stay in memory, where BackdoorBench's scripts read each from a PNG file.
- NAD's training loader cuts a square out of each image, which ours has not; WaNet in BackdoorBench rotates batches
  and crops a batch alike, where ours crops and flips image by image.
- BackdoorBench's WaNet mixes warping with the step, so that its input alone is taken with a network of ten numbers, and
  ours is then a whole fit with it.
- NAD counts top-5 accuracy by a ``view`` that today's PyTorch refuses; ours of the same arithmetic takes its place.
  NAD's evaluation calls ``cuda()``, which here does nothing, and its table is not written.
- BackdoorBench's own script tests and plots after each epoch; only its loops run. It evaluates robust accuracy
  nowhere in them, where ours counts it in the same pass. Workers, pinned memory and mixed precision are off.
"""

import argparse
import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import peers_backdoorbench
import peers_nad
import torch
from clones import Clone, load
from common import quiet
from timing import ratio, write_ratios

Sides = tuple[Callable[[], float], Callable[[], float]]
"""Seconds per image of theirs, and of ours."""

CLONES: dict[str, Clone] = {"nad": peers_nad.CLONE, "backdoorbench": peers_backdoorbench.CLONE}
ATTACKS = ("badnets", "blended", "wanet")
RATIOS: dict[str, Callable[[argparse.Namespace, Any], Sides]] = {
    "nad_input": peers_nad.inputs,
    "nad_distillation": peers_nad.distillation,
    "nad_training": peers_nad.training,
    "nad_evaluation": peers_nad.evaluation,
    **{f"backdoorbench_input_{name}": partial(peers_backdoorbench.inputs, name) for name in ATTACKS},
    **{f"backdoorbench_training_{name}": partial(peers_backdoorbench.training, name) for name in ATTACKS},
    "backdoorbench_evaluation": peers_backdoorbench.evaluation,
}


def measured(args: argparse.Namespace, name: str, clone: Any) -> dict[str, float]:
    """A ratio; what their functions print is not shown."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return ratio(args, *RATIOS[name](args, clone))


def chosen(args: argparse.Namespace) -> dict[str, str]:
    """The clone that each ratio needs, of those that were asked for or that the folders allow."""
    needed = {name: name.partition("_")[0] for name in args.only or RATIOS}
    given = {kind for kind in CLONES if getattr(args, kind) is not None}
    absent = sorted(set(needed.values()) - given)
    if absent and (args.only or not given):
        raise SystemExit(f"Expected {' and '.join(f'`--{kind}`' for kind in absent)}, the folder of a clone.")
    return {name: kind for name, kind in needed.items() if kind in given}


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, clone in CLONES.items():
        parser.add_argument(f"--{kind}", type=Path, help=f"folder of a clone of {clone.address}")
    parser.add_argument("--only", nargs="+", choices=RATIOS, help="these ratios")
    parser.add_argument("--images", type=int, default=1280, help="images of an epoch, in batches of 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "peers.json")
    args = parser.parse_args()
    if args.images < 64 or args.images % 64:
        raise SystemExit(f"Expected `--images` to be a multiple of 64 (no batch is dropped), but got {args.images}.")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # theirs and ours on the CPU
    args.work, args.source, args.jobs = Path("runs/benchmark"), "random images, 3x32x32", 1
    args.network, args.precision = "wide_resnet16_1", "32-true"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    needed = chosen(args)
    loaded = {kind: load(CLONES[kind], getattr(args, kind)) for kind in set(needed.values())}
    write_ratios(args, needed, lambda name: measured(args, name, loaded[needed[name]]))


if __name__ == "__main__":
    main()
