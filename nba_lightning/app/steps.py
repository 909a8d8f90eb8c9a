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
from nba_lightning.app.teachers import fit_teacher, take_teacher
from nba_lightning.app.unlearning import fit_unlearning
from nba_lightning.callbacks.guard import Answers
from nba_lightning.core.paired import Paired
from nba_lightning.data.owner import CleanImages
from nba_lightning.io.weights import load_weights
from nba_lightning.training.sweep import UNLEARNING_STEPS, teachers_loss

_NEXT = "Give more clean images, or allow a larger `max_loss`; or try another seed."


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

    def teach(self, steps: int) -> dict[str, Any]:
        """Make the teacher; ``tried`` says which rates were not taken, and why.

        It may lose more accuracy than the cleaned network, since the student will learn a part of it back.
        """
        may_lose = teachers_loss(self.max_loss)
        say("4/6  The teacher: a copy of the network, fine-tuned on the clean images", self.show)
        if len(self.data.held_out):
            most = f"{100 * may_lose:.1f} points of accuracy at most or what chance may"
            say(f"  looked for is the strongest learning rate that costs {most}, in up to five fits", self.show)
        found, told = self._fit_teacher(steps, may_lose)
        return {**take_teacher(found, self.chain), "tried": list(told.values())}

    def teach_gentler(self, steps: int, teacher: dict[str, Any]) -> dict[str, Any] | None:
        """A teacher that loses no more than the cleaned network may, after one whose student lost too much.

        Returns:
            It, or ``None`` if there is none; ``teacher``, the first one, stays the one in the output folder then.
        """
        most = f"{100 * self.max_loss:.1f} points; at most five more fits"
        say(f"4/6 again: the student lost too much; is there a gentler teacher? It may lose {most}", self.show)
        found, told = self._fit_teacher(steps, self.max_loss)
        first, rate = teacher["chosen"]["rate"], found["chosen"]["rate"]
        if rate >= first or found["verdict"] == "rejected":
            say("  there is none", self.show)
            return None
        told[first] = f"The one of rate {first:g} was taken first, but its student lost too much accuracy, so "
        told[first] += "a gentler one was looked for that lost no more than the cleaned network may."
        return {**take_teacher(found, self.chain), "tried": [told[rate] for rate in sorted(told, reverse=True)]}

    def _fit_teacher(self, steps: int, may_lose: float) -> tuple[dict[str, Any], dict[float, str]]:
        fitted = teachers_loss(self.max_loss)  # the same fits, whatever is asked of them
        return fit_teacher(
            self.network,
            lambda name: self._link(name, steps, fitted),
            self.chain,
            may_lose,
            len(self.data.held_out) > 0,
            self.seed,
            self.show,
        )

    def align(
        self, teacher: nn.Module, rate: float, steps: int, again: bool = False, whole: bool = True
    ) -> dict[str, Any]:
        """Align the student with the teacher, at a share of the teacher's rate; ``whole`` as in ``Verification``."""
        number = "5/6 again:" if again else "5/6 "
        say(f"{number} The student: the network, aligned with the teacher of rate {rate:g}", self.show)
        link = self._link(f"{'student' if whole else 'half a student'} of {rate:g}", steps, self.max_loss)
        found = fit_student(self.network, teacher, rate, whole, link, self.chain, self.seed, self.show)
        self.warnings += [one for one in found["warnings"] if one not in self.warnings]
        return found

    def unlearn(self, teacher: nn.Module, last: dict[str, Any]) -> dict[str, Any]:
        """Unlearn what reaches the classes that verification suspected, or all."""
        say("5/6 and: what only the suspicious network falls for is unlearned", self.show)
        kept, steps = "fits/student.safetensors", min(UNLEARNING_STEPS, last["chosen"]["steps"])
        self.chain.step(
            "keep the student", lambda: copy_file(self.chain.folder / last["file"], self.chain.folder / kept)
        )
        link, student = self._link("unlearning", steps, self.max_loss), self.with_weights(kept)
        found = fit_unlearning(self.network, teacher, student, last, link, self.chain, self.seed, self.show)
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
            if pair.loss <= self.max_loss or not pair.beyond_chance():
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
        found |= {"reason": f"The {role} lost too much clean accuracy. {last['sentence']}"}
        found["next"] = _NEXT + (" The teacher is kept beside it." if role == "student" else "")
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
