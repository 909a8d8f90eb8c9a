"""What an NBA epoch costs: passes per clean image (counted) and seconds as a multiple of a fine-tuning epoch.

    python benchmarks/cost.py

Random images of CIFAR-10's shape stand in for real ones: the arithmetic is the same. The teacher is given, so every
epoch is one that aligns. Both fits run in one process, alternating, ``--rounds`` times; the ratio is given as mean and
sample standard deviation over the rounds.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import torch
from common import DEFENSE_BATCH_SIZE, network, provenance, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nba_lightning import NBA, Classifier, FineTuning


class Counter(nn.Module):
    """A network that counts the images of its forward and backward passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.feature_layers = inner, [f"inner.{name}" for name in inner.feature_layers]
        self.forwards = self.backwards = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.inner(images)
        self.forwards += len(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: torch.Tensor) -> None:
        self.backwards += len(gradient)


def fit(args: argparse.Namespace, module: Classifier, loader: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    runner = trainer(args, args.epochs)
    start = time.perf_counter()
    runner.fit(module, loader)
    return (time.perf_counter() - start) / args.epochs


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2250)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "cost.json")
    args = parser.parse_args()
    args.data, args.network, args.jobs = "image_folder", "wide_resnet16_1", 1
    args.work, args.source = Path("runs/benchmark"), "random images, 3x32x32"
    images, labels = torch.rand(args.images, 3, 32, 32), torch.randint(0, 10, (args.images,))
    loader = DataLoader(TensorDataset(images, labels), DEFENSE_BATCH_SIZE, drop_last=True)
    counted = NBA(Counter(network(args)), teacher=Counter(network(args)))
    fit(args, counted, loader)
    networks = {"student": counted.model, "teacher": counted.teacher, "suspicious": counted.suspicious}
    passes = {
        f"{name}_{kind}": round(getattr(inner, kind) / (args.images * args.epochs), 3)
        for name, inner in networks.items()
        for kind in ("forwards", "backwards")
    }
    fit(args, FineTuning(network(args)), loader)
    ratios = []
    for _ in range(args.rounds):
        aligned = fit(args, NBA(network(args), teacher=network(args)), loader)
        ratios.append(aligned / fit(args, FineTuning(network(args)), loader))
    ratio = {"mean": round(statistics.mean(ratios), 3), "std": round(statistics.stdev(ratios), 3), "n": len(ratios)}
    result = {
        "passes_per_image_and_epoch": passes,
        "regeneration": "10 steps, one batch each, once an epoch",
        "nba_over_fine_tuning_seconds": ratio,
        "images": args.images,
        "batch_size": DEFENSE_BATCH_SIZE,
        **provenance(args),
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
