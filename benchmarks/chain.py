"""The fits of a defence: a teacher first where the method asks for one, then the student.

Each fit is kept under ``--work`` by a key of its settings, images, seed and first weights, so what is there is not
fitted again by the same code: teachers are shared, and a chain or a sweep of rates that was killed goes on where it
stopped.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import build, config, merged
from fitting import fit, fit_key
from torch import nn

import nba_lightning
from nba_lightning import NBA, BackdoorDataModule, Defense
from nba_lightning.callbacks.finite_loss import NonFiniteLossError
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.io.weights import load_weights, save_weights
from nba_lightning.training.distillation import Distillation
from nba_lightning.training.sweep import (
    RATES,
    STUDENT_SHARE,
    allowed_loss,
    keeps,
    most_accurate,
    next_rate,
    strongest_rate,
    teachers_loss,
    usual_optimizer,
)
from nba_lightning.training.verification import Verification

TEACHERS = {"NBA": "teacher", "NAD": "fine_tuning"}
"""The configuration that makes the teacher of each method."""
MAX_LOSS = 0.05
"""Accuracy on held-out images that a swept defence may lose, as `nba-lightning clean` has it."""
LEAST_STEPS = 450
"""Optimiser steps of NBA and of its teacher, as `nba-lightning clean` takes them."""
FACTORS = tuple(10 ** (half / 2) for half in (2, 1, 0, -1, -2))
"""Rates of a sweep, as multiples of the configuration's, the strongest first."""
PLAIN = ("FineTuning", "NAD", "NBA", "FTSAM", "FinePruning", "FST", "D3")
"""Defences that train all weights by SGD, and are swept over the rates that NBA's teacher gets."""


class Subject(NamedTuple):
    """What is cleaned.

    Attributes:
        name: of the cell.
        network: class path and arguments.
        weights: file with the suspicious weights.
        datamodule: the defender's images and the test set, after ``setup``.
        seed: of the defence's own draws.
    """

    name: str
    network: Any
    weights: Path
    datamodule: BackdoorDataModule
    seed: int

    @property
    def images(self) -> int:
        """How many clean images the defender trains on."""
        return len(self.datamodule.partition.clean)

    def loaded(self, weights: Path) -> nn.Module:
        """A network with weights from a file."""
        network: nn.Module = build(nn.Module, self.network).to(memory_format=torch.channels_last)
        load_weights(network, weights)
        return network


@dataclass
class Kept:
    """Fits that have ended.

    Attributes:
        path: the weights; ``None`` where the fit broke off because its numbers became infinite.
        passes, seconds, peak_memory_mib: what they cost together; see :class:`meter.Meter`.
        sweeps: which rate was chosen and why, by defence.
    """

    path: str | None
    passes: int = 0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0
    sweeps: dict[str, Any] = field(default_factory=dict)

    def add(self, other: "Kept") -> None:
        self.passes += other.passes
        self.seconds = round(self.seconds + other.seconds, 1)
        self.peak_memory_mib = max(self.peak_memory_mib, other.peak_memory_mib)
        self.sweeps |= other.sweeps


@functools.cache
def code() -> str:
    """A hash of the package's source, since a fit of yesterday's code is no result of today's."""
    found = hashlib.sha256()
    for path in sorted(Path(nba_lightning.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def needs_teacher(spec: Any, network: Any) -> bool:
    """Whether a defence asks for a teacher that its configuration does not name."""
    if "teacher_weights" in spec.get("init_args", {}):
        return False
    module = build(Defense, merged(spec, {"init_args": {"model": network}}))
    return isinstance(module, Distillation) and module.needs_teacher


def teacher_config(found: Any) -> Any:
    """The teacher's fit, on the images of the defence whose configuration is ``found``."""
    own = config("defense", TEACHERS[found["model"]["class_path"].rpartition(".")[2]])
    subset = {name: value for name, value in found["data"]["init_args"].items() if name != "batch_size"}
    changes: dict[str, Any] = {"data": {"init_args": subset}}
    families = found["model"]["init_args"].get("pseudo", {}).get("init_args", {}).get("families")
    if families is not None:  # NBA without a family has a teacher without it
        changes["model"] = {"init_args": {"pseudo": {"init_args": {"families": families}}}}
    return merged(own, changes)


def settings_of(found: Any, images: int, network: Any, sweep: bool = False) -> dict[str, Any]:
    """What a result says of the settings, those of the teacher's fit among them."""
    fits = {"": found} | ({"teacher": teacher_config(found)} if needs_teacher(found["model"], network) else {})
    told = {name: _settings(lengthened(fit, images) if sweep else fit, images) for name, fit in fits.items()}
    return told.pop("") | told


def _settings(found: Any, images: int) -> dict[str, Any]:
    subset = found["data"]["init_args"]
    subset = subset | {"batch_size": min(subset["batch_size"], images)}  # a small set may have less than one batch
    if "pseudo" in found["model"]["init_args"]:  # NBA and its teacher
        found = lengthened(found, images)
    return {"epochs": found["trainer"]["max_epochs"], **found["model"], **subset}


def lengthened(found: Any, images: int) -> Any:
    """A configuration with as many epochs as its steps need: a small set has few in an epoch.

    In a sweep the rivals that take NBA's optimiser get its steps too; the others' authors say how many they want.
    """
    if _kind(found) not in PLAIN:
        return found
    steps = images // min(found["data"]["init_args"]["batch_size"], images)
    return merged(
        found, {"trainer": {"max_epochs": max(found["trainer"]["max_epochs"], math.ceil(LEAST_STEPS / steps))}}
    )


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
    elif sweep and _kind(found) == "NBA":
        result = aligned(args, found, subject)
    else:
        asked = teacher_config(found)
        teacher = one(args, lengthened(asked, subject.images) if sweep else asked, subject)
        result = one(args, taught_by(found, teacher), subject)
        result.add(teacher)
    _check(result)
    return subject.loaded(Path(str(result.path))), result


def taught_by(found: Any, teacher: Kept) -> Any:
    """The configuration with a teacher."""
    _check(teacher)
    return merged(found, {"model": {"init_args": {"teacher_weights": teacher.path}}})


def aligned(args: argparse.Namespace, found: Any, subject: Subject) -> Kept:
    """NBA as ``nba-lightning clean`` fits it.

    The teacher may lose more accuracy than the cleaned network, and the student's rate follows the teacher's. If what
    comes of it lost too much, a teacher that did not takes its place.
    """
    asked, cost, teachers = lengthened(teacher_config(found), subject.images), Kept(None), dict[float, Kept]()
    images, baseline = len(subject.datamodule.partition.validation), accuracy_of(subject, subject.weights)
    verified = Verification().can_tell(subject.images)
    for max_loss in (teachers_loss(MAX_LOSS, verified), MAX_LOSS):
        teacher = swept(args, asked, subject, max_loss, teachers)
        _check(teacher)
        rate = taken(args, found, subject, teachers, teacher)
        if rate >= cost.sweeps.get("FineTuning", {}).get("taken", math.inf):
            break  # there is none that is gentler
        given = taught_by(found, teachers[rate])
        student = kept_fit(args, at_rate(given, STUDENT_SHARE * rate, subject), subject)
        _check(student)
        cost.add(teacher)
        cost.add(student)
        cost.path = student.path
        if keeps(accuracy_of(subject, str(student.path)), baseline, images, MAX_LOSS):
            break
    return cost


def taken(
    args: argparse.Namespace, found: Any, subject: Subject, teachers: dict[float, Kept], strongest: Kept
) -> float:
    """The rate of the most accurate teacher that withstands what the strongest does; the search joins its cost."""
    told = strongest.sweeps["FineTuning"]
    kept = [rate for rate in sorted(teachers)[::-1] if rate <= told["chosen"] and teachers[rate].path is not None]
    module: Defense = build(Defense, merged(found["model"], {"init_args": {"model": subject.network}}))
    assert isinstance(module, NBA)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = [subject.loaded(Path(str(teachers[rate].path))).to(device) for rate in kept]
    suspicious, data = subject.loaded(subject.weights).to(device), subject.datamodule
    order = data.partition.clean[shuffled(subject.images, subject.seed, 31)]
    images = data.source.load()[0].read(order).float() / 255
    size = min(found["data"]["init_args"]["batch_size"], len(images))
    batches = itertools.cycle([part.to(device) for part in images.split(size)])
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16-mixed"):
        places = module.verification.withstanding(
            networks, suspicious, batches, math.ceil(len(images) / size), generator_for(subject.seed, 8, device=device)
        )
    if len(kept) > 1:
        strongest.passes += module.verification.search.passes(data.num_classes, len(images), len(kept))
    told["withstand"] = [kept[place] for place in places]
    told["taken"] = most_accurate({kept[place]: held_out_accuracy(networks[place], data) for place in places})
    return float(told["taken"])


def _check(kept: Kept) -> None:
    if kept.path is None:
        raise NonFiniteLossError("Expected a finite training loss, but it became NaN or infinite.")


def kept_fit(args: argparse.Namespace, found: Any, subject: Subject) -> Kept:
    """One fit on the suspicious weights, unless the same one has ended before."""
    own = {"model": subject.network, "weights": str(subject.weights), "seed": subject.seed}
    module: Defense = build(Defense, merged(found["model"], {"init_args": own}))
    for network in module.networks():
        network.to(memory_format=torch.channels_last)
    settings = _settings(found, subject.images)
    # Files lie elsewhere on another day; the key knows the weights themselves.
    named = merged(settings, {"init_args": {"teacher_weights": None}})
    key = fit_key(args, module, subject.datamodule, [named, subject.seed, code()])
    path, told = (args.work / "fits" / f"{key}.{kind}" for kind in ("safetensors", "json"))
    if told.exists():
        return Kept(**json.loads(told.read_text()))
    subject.datamodule.batch_size = settings["batch_size"]
    meter = fit(args, subject.name, module, subject.datamodule, settings["epochs"], named, may_break_off=True)
    kept = Kept(str(path) if meter.finite else None, meter.passes, meter.seconds, meter.peak_memory_mib)
    if isinstance(module, NBA):
        kept.sweeps["verification"] = {"kept": round(float(module.accepted), 4), "won": module.verification.rates}
    partial = path.with_name(f"{subject.name}-{key}.partial")  # two processes may make the same one
    save_weights(module.model.state_dict(), partial)
    partial.replace(path)
    partial.write_text(json.dumps(asdict(kept)))
    partial.replace(told)
    return kept


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
    cost.path, cost.sweeps = fits[chosen].path, {_kind(found): told}
    return cost


def rates(found: Any, subject: Subject) -> tuple[float, ...]:
    """Those of a sweep: NBA's own for all that take its optimiser, multiples of the configuration's for others."""
    if _kind(found) in PLAIN:
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
    return _kind(found) in PLAIN and usual_optimizer(subject.loaded(subject.weights)) == "AdamW"


def _kind(found: Any) -> str:
    return str(found["model"]["class_path"].rpartition(".")[2])


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
