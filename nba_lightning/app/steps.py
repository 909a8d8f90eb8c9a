"""The steps of a cleaning, each done once."""

import copy
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from torch import nn

from nba_lightning import __version__
from nba_lightning.app.answers import accuracy_entry, ask, check_order
from nba_lightning.app.chain import Chain, copy_file, remove_file, say
from nba_lightning.app.fits import Link, Places, fit_student
from nba_lightning.app.scans import run_scans, scan_cost
from nba_lightning.app.teachers import fit_teacher
from nba_lightning.callbacks.guard import Answers
from nba_lightning.core.paired import Paired
from nba_lightning.data.owner import CleanImages
from nba_lightning.io.weights import load_weights
from nba_lightning.training.sweep import TEACHERS_LOSS

_NEXT = "Give more clean images, or allow a larger `max_loss`; or try another seed. The teacher is kept beside it."


class Cleaning:
    """What the steps share.

    Args:
        network: the suspicious network, images in [0, 1] to logits.
        data: the clean images, after ``setup``.
        chain: what is done.
        places: where it computes.
        max_loss: of the guard.
        seed: of everything.
        show: whether to print and show bars.

    Attributes:
        warnings: sentences for the report.
    """

    def __init__(
        self,
        network: nn.Module,
        data: CleanImages,
        chain: Chain,
        places: Places,
        max_loss: float,
        seed: int,
        show: bool,
    ) -> None:
        self.network, self.data, self.chain, self.places = network, data, chain, places
        self.max_loss, self.seed, self.show = max_loss, seed, show
        self.device = places.device()
        self.warnings: list[str] = []

    def check_classes(self, trust: bool) -> None:
        """Stop unless the network knows its classes by the folder's numbers."""
        total = len(self.data.training) + len(self.data.held_out)
        say(f"2/6  Is the order of classes the network's? One pass over {total:,} images", self.show)
        num_classes = len(self.data.classes)

        def work() -> dict[str, Any]:
            answers = ask(self.network, self.data, False, self.device, self.show)
            warning = None if trust else check_order(answers, self.data.classes, num_classes)
            return {"right": int(answers.right.sum()), "warning": warning}

        found = self.chain.step("classes", work)
        say(f"  right on {found['right']:,} of {total:,}", self.show)
        if found["warning"]:
            self.warnings.append(found["warning"])

    def scan(self, when: str, network: nn.Module) -> dict[str, Any]:
        """Scan the network ``before`` or ``after``."""
        number, what = ("3/6", "Scan") if when == "before" else ("6/6", "Scan again")
        total = len(self.data.training) + len(self.data.held_out)
        say(
            f"{number}  {what}: is a class reached unusually easily? {scan_cost(self.data.num_classes, total)}",
            self.show,
        )

        def work() -> dict[str, Any]:
            data = self.data
            return run_scans(network, data.classes, self.device, data, data.image_shape, self.seed, self.show)

        found: dict[str, Any] = self.chain.step(f"scan {when}", work)
        for method, sentence in found["verdict"].items():
            say(f"  {method}: {sentence}", self.show)
        self.warnings += [one for one in found["warnings"] if one not in self.warnings]
        return {name: value for name, value in found.items() if name != "warnings"}

    def teach(self, steps: int, gentle: bool = False) -> dict[str, Any]:
        """Make the teacher; ``tried`` says which rates were not taken, and why.

        It may lose more accuracy than the cleaned network, since the student learns a part of it back; a gentle one may
        not.
        """
        what = "A gentler teacher" if gentle else "The teacher: a copy of the network, fine-tuned on the clean images"
        say(f"4/6  {what}", self.show)
        may_lose = min(1.0, TEACHERS_LOSS * self.max_loss)
        found, tried = fit_teacher(
            self.network,
            lambda name: self._link(name, steps, may_lose),
            self.chain,
            self.max_loss if gentle else may_lose,
            len(self.data.held_out) > 0,
            self.seed,
            self.show,
        )
        return {**found, "tried": tried}

    def align(self, teacher: nn.Module, rate: float, steps: int) -> dict[str, Any]:
        """Align the student with the teacher, at a share of the teacher's rate."""
        say("5/6  The student: the network, aligned with the teacher", self.show)
        link = self._link(f"student of {rate:g}", steps, self.max_loss)
        found = fit_student(self.network, teacher, rate, link, self.chain, self.seed, self.show)
        self.warnings += found["warnings"]
        return found

    def judge_fitted(self, last: dict[str, Any]) -> dict[str, Any]:
        """Without held-out images: reject what lost too much even on the images that it was fitted on.

        They flatter it, so nothing tells a good network there, but a wrecked one is wrecked on them too.
        """

        def work() -> dict[str, Any]:
            networks = (self.network, self.with_weights(last["file"]))
            before, after = (ask(network, self.data, False, self.device) for network in networks)
            pair = Paired.of(before.right, after.right)
            if pair.loss <= self.max_loss or not pair.beyond_chance(exact=True):
                return {}
            copy_file(self.chain.folder / last["file"], self.chain.folder / "rejected.safetensors")
            sentence = (
                f"Rejected: it is right on {int(after.right.sum())} of the {pair.images} images that it was fitted on, "
                f"the suspicious network on {int(before.right.sum())}."
            )
            return {"verdict": "rejected", "sentence": sentence, "file": "rejected.safetensors"}

        if len(self.data.held_out) or last["verdict"] == "rejected":
            return last
        found: dict[str, Any] = self.chain.step("fitted", work)
        if found:
            remove_file(self.chain.folder / "cleaned.safetensors")
        return {**last, **found}

    def _link(self, name: str, steps: int, max_loss: float) -> Link:
        folder = self.chain.folder / "fits" / name.replace(" ", "-")
        return Link(name, folder, self.places, self.data, steps, max_loss, self.seed, self.show)

    def with_weights(self, file: str) -> nn.Module:
        """A copy of the network with the weights of a file in the output folder."""
        network = copy.deepcopy(self.network).cpu()
        load_weights(network, self.chain.folder / file)
        return network

    def accuracies(self, files: Mapping[str, str]) -> dict[str, Any]:
        """Clean accuracy of the suspicious network and of those in files, on held-out images if there are any."""
        held_out = len(self.data.held_out) > 0

        def of(network: nn.Module) -> dict[str, Any]:
            answers: Answers = ask(network, self.data, held_out, self.device)
            return accuracy_entry(answers, self.data.classes, held_out)

        def work() -> dict[str, Any]:
            return {"suspicious": of(self.network)} | {name: of(self.with_weights(f)) for name, f in files.items()}

        found: dict[str, Any] = self.chain.step("accuracy", work)
        return found


def versions() -> dict[str, str]:
    """Of what computes."""
    modules = {module.__name__: str(module.__version__) for module in (torch, torchvision, lightning)}
    return {"nba_lightning": __version__, **modules, "python": platform.python_version()}


def outcome(last: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Whether the weights are handed over, and if not, why and what to try."""
    rejected = last["verdict"] == "rejected"
    found: dict[str, Any] = {"file": last["file"], "handed_over": not rejected}
    if rejected:
        found |= {"reason": f"The {role} lost too much clean accuracy. {last['sentence']}", "next": _NEXT}
    return found


def page_of(folder: Path) -> tuple[Path | None, str | None]:
    """Write report.html; where that cannot be, say why."""
    try:
        from nba_lightning.app.report import write_report
    except ModuleNotFoundError as error:
        if error.name != "nba_lightning.app.report":
            raise
        return None, "report.html was not written: this version comes without the page."
    return write_report(folder), None
