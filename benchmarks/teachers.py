"""The search for NBA's teacher, when a sweep has found the strongest rate that it can afford."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import build, merged
from keeping import Kept, Subject, kept_fit
from rates import accuracy_of, at_rate, held_out_accuracy, rates
from torch import nn

from nba_lightning import NBA, Defense
from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.training.sweep import (
    MAY_BE_LEFT,
    gentler_rates,
    keeps,
    most_accurate,
    rate_between,
    witness_rate,
)


@dataclass
class Teachers:
    """A search for NBA's teacher when it has found the strongest rate.

    Attributes:
        args: what :func:`common.parser` gives.
        asked: the teacher's configuration.
        found: NBA's.
        subject: the suspicious model.
        fits: by rate.
        cost: what the search came to; what is fitted and asked beyond it joins its cost.
    """

    args: argparse.Namespace
    asked: Any
    found: Any
    subject: Subject
    fits: dict[float, Kept]
    cost: Kept

    @property
    def told(self) -> dict[str, Any]:
        """Of the search; what comes beyond it is added."""
        told: dict[str, Any] = self.cost.sweeps["FineTuning"]
        return told

    def try_rate(self, rate: float) -> float:
        """Fit one more; its accuracy on the held-out images."""
        self.fits[rate] = kept_fit(self.args, at_rate(self.asked, rate, self.subject), self.subject)
        self.cost.add(self.fits[rate])
        path = self.fits[rate].path
        right = 0.0 if path is None else accuracy_of(self.subject, path)
        self.told["accuracies"][f"{rate:g}"] = round(right, 4)
        return right

    def try_gentler(self) -> None:
        """Fit teachers at the rates that the search left out below the strongest."""
        for rate in gentler_rates(rates(self.asked, self.subject), self.fits, self.told["chosen"]):
            self.try_rate(rate)

    def taken(self, max_loss: float) -> float:
        """The rate of the most accurate teacher that withstands what the strongest does.

        A stronger one that lost more than ``max_loss`` bears witness to what the strongest has kept of the backdoor;
        where it has kept some, a rate between both is tried too.
        """
        self._compare()
        if self.told["left"] > MAY_BE_LEFT and self.told["witness"] is not None:
            subject, between = self.subject, rate_between(self.told["chosen"], self.told["witness"])
            baseline, images = accuracy_of(subject, subject.weights), len(subject.datamodule.partition.validation)
            if keeps(self.try_rate(between), baseline, images, max_loss):
                self.told["chosen"] = between
                self._compare()
        return float(self.told["taken"])

    def _compare(self) -> None:
        """Ask which teachers withstand what the strongest does, and what it has kept, and tell."""
        right, strongest = {float(rate): now for rate, now in self.told["accuracies"].items()}, self.told["chosen"]
        kept = [rate for rate in sorted(self.fits)[::-1] if rate <= strongest and self.fits[rate].path is not None]
        witness = witness_rate(right, strongest, self.told["baseline"])
        module: Defense = build(Defense, merged(self.found["model"], {"init_args": {"model": self.subject.network}}))
        assert isinstance(module, NBA)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        subject, size = self.subject, self.found["data"]["init_args"]["batch_size"]

        def fitted(rate: float) -> nn.Module:
            return subject.loaded(Path(str(self.fits[rate].path))).to(device)

        networks = [fitted(rate) for rate in kept]
        suspicious, data = subject.loaded(subject.weights).to(device), subject.datamodule
        order = data.partition.clean[shuffled(subject.images, subject.seed, 31)]
        parts = (data.source.load()[0].read(order).float() / 255).split(min(size, len(order)))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.precision == "bf16-mixed"):
            places, left = module.verification.withstanding(
                networks,
                suspicious,
                itertools.cycle([part.to(device) for part in parts]),
                len(parts),
                generator_for(subject.seed, 8, device=device),
                None if witness is None else fitted(witness),
            )
        if module.verification.can_compare(len(kept), witness is not None, len(order)):
            self.cost.passes += module.verification.passes_of_comparing(data.num_classes, len(order), len(kept))
        chosen = most_accurate({kept[place]: held_out_accuracy(networks[place], data) for place in places})
        withstand = [kept[place] for place in places]
        self.told.update(withstand=withstand, witness=witness, left=round(left, 4), taken=chosen)
