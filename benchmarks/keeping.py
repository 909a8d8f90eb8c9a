"""Fits that are made once: what is kept of each, by its settings, images, seed and first weights.

What is there is not fitted again by the same code, so teachers are shared, and a chain or a sweep of rates that was
killed goes on where it stopped.
"""

import argparse
import functools
import hashlib
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
from nba_lightning import NBA, BackdoorDataModule, Defense, Unlearning
from nba_lightning.callbacks.finite_loss import NonFiniteLossError
from nba_lightning.io.weights import load_weights, save_weights
from nba_lightning.training.distillation import Distillation
from nba_lightning.training.sweep import teachers_latent_share

TEACHERS = {"NBA": "teacher", "NAD": "fine_tuning"}
"""The configuration that makes the teacher of each method."""
LEAST_STEPS = 450
"""Optimiser steps of NBA and of its teacher, as `nba-lightning clean` takes them."""
PLAIN = ("FineTuning", "NAD", "NBA", "Unlearning", "FTSAM", "FinePruning", "FST", "D3")
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


def teacher_config(found: Any, images: int) -> Any:
    """The teacher's fit, on so many images of the defence whose configuration is ``found``.

    An ablation may change the teacher alone, by ``teacher``.
    """
    own = config("defense", TEACHERS[found["model"]["class_path"].rpartition(".")[2]])
    subset = {name: value for name, value in found["data"]["init_args"].items() if name != "batch_size"}
    changes: dict[str, Any] = {"data": {"init_args": subset}}
    families = found["model"]["init_args"].get("pseudo", {}).get("init_args", {}).get("families")
    if families is not None:  # NBA without a family has a teacher without it
        changes["model"] = {"init_args": {"pseudo": {"init_args": {"families": families}}}}
    if "steps" in found:
        changes["steps"] = found["steps"]
    made = merged(merged(own, changes), {"model": {"init_args": found.get("teacher", {})}})
    if not teachers_latent_share(images):
        for name in ("latent", "latent_share"):
            made["model"]["init_args"].pop(name, None)
    return made


def settings_of(found: Any, images: int, network: Any, sweep: bool = False) -> dict[str, Any]:
    """What a result says of the settings, those of the teacher's fit among them."""
    fits = {"": found} | ({"teacher": teacher_config(found, images)} if needs_teacher(found["model"], network) else {})
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

    In a sweep the rivals that take NBA's optimiser get its steps too; the others' authors say how many they want. An
    ablation may ask for another number of ``steps``, about which are then taken, rather than at least.
    """
    if kind_of(found) not in PLAIN:
        return found
    steps = images // min(found["data"]["init_args"]["batch_size"], images)
    epochs = math.ceil(found.get("steps", LEAST_STEPS) / steps)
    if "steps" not in found:
        epochs = max(found["trainer"]["max_epochs"], epochs)
    return merged(found, {"trainer": {"max_epochs": epochs}})


def kept_fit(args: argparse.Namespace, found: Any, subject: Subject) -> Kept:
    """One fit on the suspicious weights, unless the same one has ended before."""
    own = {"model": subject.network, "weights": str(subject.weights), "seed": subject.seed}
    module: Defense = build(Defense, merged(found["model"], {"init_args": own}))
    for network in module.networks():
        network.to(memory_format=torch.channels_last)
    settings = _settings(found, subject.images)
    # Files lie elsewhere on another day; the key knows the weights themselves.
    named = merged(settings, {"init_args": {"teacher_weights": None, "start_weights": None}})
    key = fit_key(args, module, subject.datamodule, [named, subject.seed, code()])
    path, told = (args.work / "fits" / f"{key}.{kind}" for kind in ("safetensors", "json"))
    if told.exists():
        return Kept(**json.loads(told.read_text()))
    subject.datamodule.batch_size = settings["batch_size"]
    meter = fit(args, subject.name, module, subject.datamodule, settings["epochs"], named, may_break_off=True)
    kept = Kept(str(path) if meter.finite else None, meter.passes, meter.seconds, meter.peak_memory_mib)
    if isinstance(module, NBA):
        came_back = round(module.verification.came_back, 4)
        verified = {"kept": round(float(module.accepted), 4), "came_back": came_back}
        verified |= {"suspected": module.verification.suspected, "to_unlearn": module.verification.to_unlearn}
        verified["won"] = module.verification.rates
        kept.sweeps["verification"] = verified
    if isinstance(module, Unlearning):
        kept.sweeps["unlearning"] = {"reached": round(module.reached, 4), "left": round(module.left, 4)}
    partial = path.with_name(f"{subject.name}-{key}.partial")  # two processes may make the same one
    save_weights(module.model.state_dict(), partial)
    partial.replace(path)
    partial.write_text(json.dumps(asdict(kept)))
    partial.replace(told)
    return kept


def check_finite(kept: Kept) -> None:
    if kept.path is None:
        raise NonFiniteLossError("Expected a finite training loss, but it became NaN or infinite.")


def kind_of(found: Any) -> str:
    return str(found["model"]["class_path"].rpartition(".")[2])
