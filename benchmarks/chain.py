"""The fits of a defence: its teacher first, if the method asks for one, at rates that are given or found."""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import build, config, merged
from keeping import PLAIN, Kept, Subject, check_finite, kept_fit, kind_of, lengthened, needs_teacher, teacher_config
from torch import nn

from nba_lightning import NBA, BackdoorDataModule, Defense
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.training.sweep import (
    MAY_BE_LEFT,
    RATES,
    STUDENT_SHARE,
    UNLEARNING_STEPS,
    allowed_loss,
    gentler_rates,
    keeps,
    may_replace,
    most_accurate,
    next_rate,
    rate_between,
    strongest_rate,
    teachers_loss,
    teachers_mixed_share,
    unlearning_rate,
    usual_optimizer,
    witness_rate,
)
from nba_lightning.training.verification import Verification

MAX_LOSS = 0.05
"""Accuracy on held-out images that a swept defence may lose, as `nba-lightning clean` has it."""
FACTORS = tuple(10 ** (half / 2) for half in (2, 1, 0, -1, -2))
"""Rates of a sweep, as multiples of the configuration's, the strongest first."""


def clean(args: argparse.Namespace, found: Any, subject: Subject, sweep: bool = False) -> tuple[nn.Module, Kept]:
    """Fit a defence, after its teacher if it needs one; the cleaned network, and what all fits cost.

    Args:
        args: what :func:`common.parser` gives.
        found: the defence's configuration: ``model``, ``data`` and ``trainer``, as in ``configs/defense``.
        subject: the suspicious model.
        sweep: whether the teacher's rate and the defence's are found by :func:`swept`.

    Raises:
        NonFiniteLossError: where numbers became infinite.
    """
    one = swept if sweep else kept_fit
    found = lengthened(found, subject.images) if sweep else found
    if not needs_teacher(found["model"], subject.network):
        result = one(args, found, subject)
    elif sweep and kind_of(found) == "NBA":
        result = aligned(args, found, subject)
    else:
        asked = teacher_config(found)
        teacher = one(args, lengthened(asked, subject.images) if sweep else asked, subject)
        result = one(args, taught_by(found, teacher), subject)
        result.add(teacher)
    check_finite(result)
    return subject.loaded(Path(str(result.path))), result


def taught_by(found: Any, teacher: Kept) -> Any:
    """The configuration with a teacher."""
    check_finite(teacher)
    return merged(found, {"model": {"init_args": {"teacher_weights": teacher.path}}})


def aligned(args: argparse.Namespace, found: Any, subject: Subject) -> Kept:
    """NBA as ``nba-lightning clean`` fits it.

    The teacher may lose more accuracy than the cleaned network, and the student's rate follows the teacher's. If what
    comes of it lost too much, a teacher that did not takes its place. What reaches classes that verification
    suspected is unlearned, or any class.
    """
    asked = lengthened(teacher_config(found), subject.images)
    asked = merged(asked, {"model": {"init_args": {"mixed_share": teachers_mixed_share(subject.images)}}})
    cost, teachers = Kept(None), dict[float, Kept]()
    images, baseline = len(subject.datamodule.partition.validation), accuracy_of(subject, subject.weights)
    verified = Verification().can_tell(subject.images)
    for max_loss in (teachers_loss(MAX_LOSS), MAX_LOSS):
        teacher = swept(args, asked, subject, max_loss, teachers)
        check_finite(teacher)
        sweep = Teachers(args, asked, found, subject, teachers, teacher)
        if verified:
            sweep.try_gentler()
        rate = sweep.taken(max_loss)
        if rate >= cost.sweeps.get("FineTuning", {}).get("taken", math.inf):
            break  # there is none that is gentler
        given = taught_by(found, teachers[rate])
        student = kept_fit(args, at_rate(given, STUDENT_SHARE * rate, subject), subject)
        check_finite(student)
        cost.add(teacher)
        cost.add(student)
        cost.path = student.path
        if keeps(accuracy_of(subject, str(student.path)), baseline, images, MAX_LOSS):
            break
    classes = cost.sweeps["verification"]["to_unlearn"]
    if classes:
        unlearn(args, found, subject, teachers[cost.sweeps["FineTuning"]["taken"]], classes, cost)
    return cost


def unlearn(
    args: argparse.Namespace, found: Any, subject: Subject, teacher: Kept, classes: list[int], cost: Kept
) -> None:
    """Unlearn what reaches some classes, and take what comes of it unless it lost too much accuracy.

    Args:
        args: what :func:`common.parser` gives.
        found: NBA's configuration.
        subject: the suspicious model.
        teacher: NBA's.
        classes: the suspected ones, or all.
        cost: NBA's; the network is ``cost.path``, and what is unlearned joins it.
    """
    own, subset = config("defense", "unlearning"), found["data"]["init_args"]
    steps = subject.images // min(subset["batch_size"], subject.images)
    given = {"teacher_weights": teacher.path, "start_weights": cost.path, "classes": classes}
    changes = {"model": {"init_args": given}, "data": {"init_args": subset}}
    changes["trainer"] = {"max_epochs": math.ceil(UNLEARNING_STEPS / steps)}
    student = STUDENT_SHARE * cost.sweeps["FineTuning"]["taken"]
    rate = unlearning_rate(student, usual_optimizer(subject.loaded(subject.weights)))
    fit = kept_fit(args, at_rate(merged(own, changes), rate, subject), subject)
    cost.add(fit)
    if fit.path is None:
        return
    baseline, images = accuracy_of(subject, subject.weights), len(subject.datamodule.partition.validation)
    before, after = (accuracy_of(subject, str(path)) for path in (cost.path, fit.path))
    taken = may_replace(after, before, baseline, images, MAX_LOSS)
    cost.sweeps["unlearning"] = {"taken": taken, "before": round(before, 4), "after": round(after, 4)}
    cost.path = fit.path if taken else cost.path


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
        if self.told["left"] > MAY_BE_LEFT:
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
            self.cost.passes += module.verification.search.passes(data.num_classes, len(order), len(kept))
        chosen = most_accurate({kept[place]: held_out_accuracy(networks[place], data) for place in places})
        withstand = [kept[place] for place in places]
        self.told.update(withstand=withstand, witness=witness, left=round(left, 4), taken=chosen)


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
