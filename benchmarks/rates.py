"""The strongest learning rate that a defence can afford, and how a fit at a rate is configured."""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import merged
from keeping import PLAIN, Kept, Subject, kept_fit, kind_of
from torch import nn

from nba_lightning import BackdoorDataModule
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.training.sweep import RATES, allowed_loss, keeps, next_rate, strongest_rate, usual_optimizer

MAX_LOSS = 0.05
"""Accuracy on held-out images that a swept defence may lose, as `nba-lightning clean` has it."""
FACTORS = tuple(10 ** (half / 2) for half in (2, 1, 0, -1, -2))
"""Rates of a sweep, as multiples of the configuration's, the strongest first."""


def swept(
    args: argparse.Namespace,
    found: Any,
    subject: Subject,
    max_loss: float = MAX_LOSS,
    fits: dict[float, Kept] | None = None,
) -> Kept:
    """The fit at the strongest rate that keeps the accuracy on held-out clean images but for ``max_loss``.

    It looks at nothing else. :func:`next_rate` says what to try; what all new fits cost is added up.

    Args:
        args: what :func:`common.parser` gives.
        found: the defence's configuration.
        subject: the suspicious model.
        max_loss: accuracy that may be lost, in [0, 1].
        fits: of another sweep, by rate, whose cost is counted there; new ones are added.
    """
    fits = {} if fits is None else fits
    images, baseline = len(subject.datamodule.partition.validation), accuracy_of(subject, subject.weights)
    accuracies, cost, kept = dict[float, float](), Kept(None), dict[float, bool]()
    choices = rates(found, subject)
    while (rate := next_rate(choices, kept)) is not None:
        if rate not in fits:
            fits[rate] = kept_fit(args, at_rate(found, rate, subject), subject)
            cost.add(fits[rate])
        path = fits[rate].path
        accuracies[rate] = 0.0 if path is None else accuracy_of(subject, path)
        kept[rate] = keeps(accuracies[rate], baseline, images, max_loss)
    chosen = strongest_rate(accuracies, baseline, images, max_loss)
    told = {"chosen": chosen, "accuracies": {f"{rate:g}": round(accuracies[rate], 4) for rate in sorted(kept)[::-1]}}
    told |= {"kept": kept[chosen], "baseline": round(baseline, 4), "images": images}
    told |= {"allowed_loss": round(allowed_loss(baseline, images, max_loss), 4)}
    cost.path, cost.sweeps = fits[chosen].path, {kind_of(found): told}
    return cost


def rates(found: Any, subject: Subject) -> tuple[float, ...]:
    """Those of a sweep: NBA's own for all that take its optimiser, multiples of the configuration's for others."""
    if kind_of(found) in PLAIN:
        return RATES[usual_optimizer(subject.loaded(subject.weights))]
    lr = found["model"]["init_args"]["lr"]
    return tuple(float(f"{factor * lr:.3g}") for factor in FACTORS)


def at_rate(found: Any, rate: float, subject: Subject) -> Any:
    """The configuration at another rate, with the network's usual optimiser where it would take SGD."""
    changes: dict[str, Any] = {"lr": rate}
    if _adaptive(found, subject):
        changes |= {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate}}, "warmup": 0.05}
    return merged(found, {"model": {"init_args": changes}})


def _adaptive(found: Any, subject: Subject) -> bool:
    """Whether AdamW should stand in for a defence's SGD."""
    return kind_of(found) in PLAIN and usual_optimizer(subject.loaded(subject.weights)) == "AdamW"


def accuracy_of(subject: Subject, weights: str | Path) -> float:
    """Accuracy of a file's weights on the clean images that the defender holds out."""
    return held_out_accuracy(subject.loaded(Path(weights)), subject.datamodule)


@torch.no_grad()
def held_out_accuracy(network: nn.Module, datamodule: BackdoorDataModule) -> float:
    """Accuracy on the clean images that the defender holds out."""
    loader = datamodule.held_out_dataloader()
    if loader is None:
        raise ValueError("Expected a `validation_fraction` that holds images out, but got none.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    right, seen = 0, 0
    network.to(device)
    with evaluating(network):
        for batch in loader:
            ready = datamodule.on_after_batch_transfer(batch.to(device), 0)
            known = ready.labels >= 0
            right += int(((predict(network, ready.images).argmax(dim=1) == ready.labels) & known).sum())
            seen += int(known.sum())
    return right / seen
