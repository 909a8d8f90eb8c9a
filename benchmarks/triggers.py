"""What triggering costs: a batch on the CPU against a loop over images, and a poisoned epoch against a clean one.

    python benchmarks/triggers.py

The loop is what image pipelines usually do: a PIL image becomes a NumPy array, gets the trigger, becomes a tensor and
is collated. Both start from uint8 and end in float batches in [0, 1] with the attacker's labels; of several repeats in
a round the fastest counts. Random images of CIFAR-10's shape stand in for real ones. Ratios are taken within one run,
alternating, and given as mean and sample standard deviation over the rounds.
"""

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHAPE, Noise, data, network, provenance, spread, trainer
from PIL import Image
from scipy import fft, ndimage

from nba_lightning import Classifier
from nba_lightning.attacks import BPP, SIG, Attack, BadNets, Blended, FTrojan, WaNet
from nba_lightning.data import Source

Loop = Callable[[np.ndarray], np.ndarray]


def badnets(attack: BadNets) -> Loop:
    patch = (attack.patch.numpy().transpose(1, 2, 0)[-3:, -3:] * 255).astype(np.uint8)

    def apply(image: np.ndarray) -> np.ndarray:
        image = image.copy()
        image[-3:, -3:] = patch
        return image

    return apply


def blended(attack: Blended) -> Loop:
    pattern = attack.blend.numpy().transpose(1, 2, 0) * 255
    return lambda image: np.clip(0.8 * image + 0.2 * pattern, 0, 255).astype(np.uint8)


def sig(attack: SIG) -> Loop:
    def apply(image: np.ndarray) -> np.ndarray:
        signal = np.zeros_like(image, dtype=np.float32)
        signal += 40 * np.sin(2 * np.pi * 6 * np.arange(image.shape[1]) / image.shape[1])[None, :, None]
        return np.clip(image + signal, 0, 255).astype(np.uint8)

    return apply


def wanet(attack: WaNet) -> Loop:
    grid = (attack.field[0].numpy() + 1) / 2 * 31

    def apply(image: np.ndarray) -> np.ndarray:
        where = [grid[..., 1], grid[..., 0]]
        planes = [ndimage.map_coordinates(image[..., c].astype(np.float32), where, order=1) for c in range(3)]
        return np.clip(np.stack(planes, axis=2), 0, 255).astype(np.uint8)

    return apply


def bpp(attack: BPP) -> Loop:
    return lambda image: (np.round(image / 255 * 7) / 7 * 255).astype(np.uint8)


def ftrojan(attack: FTrojan) -> Loop:
    def apply(image: np.ndarray) -> np.ndarray:
        planes = np.asarray(Image.fromarray(image).convert("YCbCr")).astype(np.float32)
        for channel in (1, 2):
            coefficients = fft.dctn(planes[..., channel], norm="ortho")
            for place in (15, 31):
                coefficients[place, place] += 30
            planes[..., channel] = fft.idctn(coefficients, norm="ortho")
        changed = np.clip(planes, 0, 255).astype(np.uint8)
        return np.asarray(Image.fromarray(changed, "YCbCr").convert("RGB"))

    return apply


LOOPS: dict[type[Attack], Callable[[Any], Loop]] = {
    BadNets: badnets,
    Blended: blended,
    SIG: sig,
    WaNet: wanet,
    BPP: bpp,
    FTrojan: ftrojan,
}


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def rates(attack: Attack, loop: Loop, batch: int, rounds: int) -> dict[str, float]:
    """Images per second of ours over the loop's."""
    images, labels = torch.randint(0, 256, (batch, *SHAPE), dtype=torch.uint8), torch.randint(0, 10, (batch,))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    roles = torch.ones(batch, dtype=torch.uint8)
    attack.cross_ratio = 0  # the loop makes no cross images

    def ours() -> None:
        attack.poison(images.float().div_(255), labels, roles)

    def theirs() -> None:
        torch.stack([to_tensor(Image.fromarray(loop(np.array(picture)))) for picture in pictures])
        torch.tensor([attack.target for _ in pictures])

    for function in (ours, theirs):
        function()
    return spread([seconds(theirs, 5) / seconds(ours, 30) for _ in range(rounds)])


def epochs(args: argparse.Namespace, attack: Attack, source: Source) -> dict[str, float]:
    """Seconds of a poisoned epoch over a clean one's."""

    def fit(used: Attack | None) -> float:
        module, runner = Classifier(network(args)), trainer(args, 1)
        datamodule = data(args, source, used, batch_size=128)
        start = time.perf_counter()
        runner.fit(module, datamodule)
        return time.perf_counter() - start

    fit(None)
    ratios = []
    for index in range(args.rounds):
        first, second = (attack, None) if index % 2 else (None, attack)
        times = {used is None: fit(used) for used in (first, second)}
        ratios.append(times[False] / times[True])
    return spread(ratios)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000, help="images of an epoch")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "triggers.json")
    args = parser.parse_args()
    args.data, args.network, args.jobs = "image_folder", "wide_resnet16_1", 1
    args.work, args.source = Path("runs/benchmark"), "random images, 3x32x32"
    torch.manual_seed(0)
    source = Noise(args.images)
    result: dict[str, Any] = {"batch_size": args.batch_size, "images": args.images, **provenance(args)}
    result |= {"rate_over_loop": {}, "poisoned_over_clean_epoch": {}}
    for attack_class, loop in LOOPS.items():
        attack = attack_class()
        attack.prepare(SHAPE, 10)
        rate = rates(attack, loop(attack), args.batch_size, args.rounds)
        result["rate_over_loop"][attack_class.__name__] = rate
        print(attack_class.__name__, "rate over a loop's", rate, flush=True)
    for attack_class in (BadNets, Blended, SIG, FTrojan):
        ratio = epochs(args, attack_class(), source)
        result["poisoned_over_clean_epoch"][attack_class.__name__] = ratio
        print(attack_class.__name__, "poisoned over clean epoch", ratio, flush=True)
        assert math.isfinite(ratio["mean"])
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
