"""What an NBA epoch costs: passes per clean image (counted) and seconds as a multiple of a fine-tuning epoch.

    python benchmarks/cost.py

Random images of CIFAR-10's shape stand in for real ones: the arithmetic is the same. Both fits run in one process,
alternating, ``--rounds`` times; the ratio is given as mean and sample standard deviation over the rounds.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import network, provenance
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


def fit(module: Classifier, loader: DataLoader[tuple[torch.Tensor, ...]], precision: str, epochs: int) -> float:
    trainer = pl.Trainer(
        max_epochs=epochs,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.configure_callbacks = lambda: [
        c for c in type(module).configure_callbacks(module) if "Weights" not in str(c)
    ]
    start = time.perf_counter()
    trainer.fit(module, loader)
    return time.perf_counter() - start


def nba(counting: bool = False) -> NBA:
    student, teacher = network(), network()
    return NBA(Counter(student), teacher=Counter(teacher)) if counting else NBA(student, teacher=teacher)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "cost.json")
    args = parser.parse_args()
    images, labels = torch.rand(args.images, 3, 32, 32), torch.randint(0, 10, (args.images,))
    loader = DataLoader(TensorDataset(images, labels), args.batch_size)
    counted = nba(counting=True)
    fit(counted, loader, args.precision, 1)
    networks = {"student": counted.model, "teacher": counted.teacher}
    passes = {
        f"{name}_{kind}": getattr(inner, kind) / args.images
        for name, inner in networks.items()
        for kind in ("forwards", "backwards")
    }
    fit(FineTuning(network()), loader, args.precision, 1)
    ratios = [
        fit(nba(), loader, args.precision, args.epochs)
        / fit(FineTuning(network()), loader, args.precision, args.epochs)
        for _ in range(args.rounds)
    ]
    result = {
        "passes_per_image": passes,
        "regeneration": "10 steps, one batch each, once an epoch",
        "images": args.images,
        "nba_over_fine_tuning": {
            "mean": round(statistics.mean(ratios), 3),
            "std": round(statistics.stdev(ratios), 3),
            "rounds": args.rounds,
        },
        "network": "WideResNet-16-1",
        "batch_size": args.batch_size,
        "precision": args.precision,
        **provenance(),
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
