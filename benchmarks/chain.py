"""The fits of a defence: a teacher first where the method asks for one, then the student; each goes on by itself."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import build, config, merged
from fitting import fit, fit_key
from meter import Meter

from nba_lightning import BackdoorDataModule, Defense
from nba_lightning.io.weights import save_weights
from nba_lightning.training.distillation import Distillation

TEACHER = "fine_tuning"


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


@dataclass
class Cost:
    """What fits cost together; see :class:`meter.Meter`."""

    passes: int = 0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0

    def add(self, other: "Cost | Meter") -> None:
        self.passes += other.passes
        self.seconds = round(self.seconds + other.seconds, 1)
        self.peak_memory_mib = max(self.peak_memory_mib, other.peak_memory_mib)


def needs_teacher(spec: Any, network: Any) -> bool:
    """Whether a defence asks for a teacher that its configuration does not name."""
    if "teacher_weights" in spec.get("init_args", {}):
        return False
    module = build(Defense, merged(spec, {"init_args": {"model": network}}))
    return isinstance(module, Distillation) and module.needs_teacher


def teacher_config(found: Any) -> Any:
    """The teacher's fit, on the images of the defence whose configuration is ``found``."""
    own = config("defense", TEACHER)
    subset = {name: value for name, value in found["data"]["init_args"].items() if name != "batch_size"}
    return merged(own, {"data": {"init_args": subset}})


def fitting_batch(found: Any, images: int) -> int:
    """A small set may have less than one of the authors' batches."""
    return int(min(found["data"]["init_args"]["batch_size"], images))


def settings_of(found: Any, images: int, network: Any) -> dict[str, Any]:
    """What a result says of the settings, those of the teacher's fit among them."""
    settings = _settings(found, images)
    if needs_teacher(found["model"], network):
        settings["teacher"] = _settings(teacher_config(found), images)
    return settings


def _settings(found: Any, images: int) -> dict[str, Any]:
    subset = found["data"]["init_args"] | {"batch_size": fitting_batch(found, images)}
    return {"epochs": found["trainer"]["max_epochs"], **found["model"], **subset}


def clean(args: argparse.Namespace, found: Any, subject: Subject) -> tuple[Defense, Cost]:
    """Fit a defence, after its teacher if it needs one; the module, and the cost of both.

    Args:
        args: what :func:`common.parser` gives.
        found: the defence's configuration: ``model``, ``data`` and ``trainer``, as in ``configs/defense``.
        subject: the suspicious model.
    """
    cost, files = Cost(), {}
    if needs_teacher(found["model"], subject.network):
        path, before = teacher(args, teacher_config(found), subject)
        files["teacher_weights"] = str(path)
        cost.add(before)
    module, meter = fit_one(args, found, subject, **files)
    cost.add(meter)
    return module, cost


def fit_one(args: argparse.Namespace, found: Any, subject: Subject, **files: str) -> tuple[Defense, Meter]:
    """One fit on the suspicious weights."""
    own = {"model": subject.network, "weights": str(subject.weights), "seed": subject.seed, **files}
    module: Defense = build(Defense, merged(found["model"], {"init_args": own}))
    for network in module.networks():
        network.to(memory_format=torch.channels_last)
    settings = _settings(found, subject.images)
    subject.datamodule.batch_size = settings["batch_size"]
    return module, fit(args, subject.name, module, subject.datamodule, settings["epochs"], settings)


def teacher(args: argparse.Namespace, found: Any, subject: Subject) -> tuple[Path, Cost]:
    """Weights of a teacher and what it cost; fitted if the same one is not there yet.

    All defences of one seed share it, under ``--work``, by a key of its settings, images, seed and first weights.
    """
    module: Defense = build(
        Defense, merged(found["model"], {"init_args": {"model": subject.network, "weights": str(subject.weights)}})
    )
    settings = _settings(found, subject.images)
    key = fit_key(args, module, subject.datamodule, [settings["epochs"], settings, subject.seed])
    path = args.work / "teachers" / f"{key}.safetensors"
    told = path.with_suffix(".json")
    if not told.exists():
        module, meter = fit_one(args, found, subject._replace(name=f"{subject.name}-teacher"))
        partial = path.with_name(f"{subject.name}-{key}.partial")  # two processes may make the same one
        save_weights(module.model.state_dict(), partial)
        partial.replace(path)
        cost = Cost()
        cost.add(meter)
        partial.write_text(json.dumps(asdict(cost)))
        partial.replace(told)
    return path, Cost(**json.loads(told.read_text()))
