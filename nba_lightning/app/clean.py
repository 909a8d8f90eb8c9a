"""From a suspicious network and a folder of clean images to a cleaned network and a report."""

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from nba_lightning import __version__
from nba_lightning.app.chain import Chain, check_folder, say, write_json
from nba_lightning.app.fits import STUDENT_STEPS, TEACHER_STEPS, Places
from nba_lightning.app.networks import count_classes
from nba_lightning.app.quiet import quiet
from nba_lightning.app.reasons import reasons
from nba_lightning.app.report_figures import interval
from nba_lightning.app.report_reading import Accuracy
from nba_lightning.app.runs import own_interrupts
from nba_lightning.app.steps import Cleaning, outcome, page_of, versions
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.modes import check_finite, fingerprint
from nba_lightning.data.owner import CleanImages
from nba_lightning.io.adapters import Normalized, bare
from nba_lightning.training.sweep import MAY_BE_LEFT, teachers_latent_share

_COPIES = 20
"""Of the network on the disk: each teacher's and the student's weights, and their checkpoints with an optimiser's."""

_LEAST_SHARE = 0.5
"""Of the default's steps, of which fewer for the teacher are warned of."""

_LEFT = (
    "The teacher (rate {:g}) falls for {:.0f} % of what the suspicious network falls for and a stronger teacher, which "
    "lost too much accuracy, withstands, or is led to a suspected class as easily by what is crafted on it alone; "
    "about as much of the backdoor may be left. A larger `max_loss`, or more clean images, leave less of it."
)
_SHORT = (
    "The teacher was to be fitted for {} steps, by default it is {}. A shorter fit forgets less of a backdoor, and "
    "nothing here shows how much less."
)
_NO_GENTLER = "Its student lost too much, and there is no gentler teacher that keeps the accuracy asked for."


def clean(
    network: nn.Module,
    images: str | Path | CleanImages,
    output: str | Path = "cleaned",
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_loss: float = 0.05,
    teacher_steps: int = TEACHER_STEPS,
    student_steps: int = STUDENT_STEPS,
    scan: bool = True,
    trust_classes: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    described: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scan a network, make a teacher, align it with the teacher, unlearn what leads to a class, scan again, report.

    Leaves ``cleaned.safetensors`` with the keys and dtypes of ``network`` (or ``rejected.safetensors``, if it lost more
    clean accuracy than ``max_loss`` and than chance), ``teacher.safetensors``, ``report.json``, ``report.html`` and
    ``report/``. Each step is done once: called again with the same arguments and ``output``, it goes on.

    Args:
        network: the suspicious network; it stays as it is.
        images: a folder ``images/<class>/*`` of clean images, or the data module of it.
        output: the folder for results.
        classes: names of the class folders in the order of the network's outputs; ``None`` for alphabetical order.
        image_size: resize all images to this height and width; ``None`` for images of one size.
        channels: 3 for colour, 1 for grey.
        mean: of the normalisation that the network expects; ``None`` for a network that takes images in [0, 1].
        std: likewise.
        max_loss: clean accuracy that may be lost; the teacher may lose 1.75 times as much.
        teacher_steps: optimiser steps of each teacher that is tried.
        student_steps: optimiser steps of the alignment.
        scan: whether to scan before and after.
        trust_classes: go on though the network is right on fewer than half of the images.
        seed: of everything.
        device: ``auto``, ``cpu``, ``cuda`` or another accelerator of Lightning's.
        progress: whether to say what happens and show bars.
        described: how the network was made, plain values, for the report's lines on loading the weights: ``network``
            (import path) and ``arguments``.

    Returns:
        What is in ``report.json``.

    Raises:
        ValueError: for a folder or network that cannot be, a network that does not know its classes, or an ``output``
            with the results of another run.
        KeyboardInterrupt: on Ctrl-C, also within a fit.
    """
    check_range("max_loss", max_loss, 0.0, 1.0)
    check_at_least("teacher_steps", teacher_steps, 1)
    check_at_least("student_steps", student_steps, 1)
    folder = Path(output)
    check_folder(folder)
    check_finite(network, "network")
    if (mean is None) != (std is None):
        raise expected("mean", "given with `std`, or neither", f"{mean} and {std}")
    network = copy.deepcopy(network if mean is None or std is None else Normalized(network, mean, std))
    data = _images(images, classes, image_size, channels, seed)
    with quiet(chained=True, silent=not progress), _interruptible():
        say("1/6  The images", progress)
        data.setup()
        more = data.name_further_classes(count_classes(network, data.image_shape))
        # What another version left may lack what this one needs, or have been decided otherwise.
        asked: dict[str, Any] = {"version": __version__, "max_loss": max_loss}
        asked |= {"teacher_steps": teacher_steps, "student_steps": student_steps}
        asked |= {"scan": scan, "trust_classes": trust_classes, "seed": seed, **_identity(network, data)}
        size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
        chain = Chain(folder, asked, _COPIES * size + 2**24)
        run = Cleaning(network, data, chain, Places.of(device), max_loss, seed, progress)
        if more:
            run.warnings.append(f"The network has {len(more)} more classes than have names, taken to come last.")
        if teacher_steps < _LEAST_SHARE * TEACHER_STEPS:
            run.warnings.append(_SHORT.format(teacher_steps, TEACHER_STEPS))
        report = _chain(run, teacher_steps, student_steps, scan, trust_classes, described or {})
        _finish(report, folder, progress)
    return report


def _images(
    images: str | Path | CleanImages, classes: Sequence[str] | None, image_size: int | None, channels: int, seed: int
) -> CleanImages:
    """The data module of a folder, or the one that was given."""
    if not isinstance(images, CleanImages):
        return CleanImages(str(images), None if classes is None else list(classes), image_size, channels, seed=seed)
    both = {"classes": classes is not None, "image_size": image_size is not None, "channels": channels != 3}
    if any(both.values()):
        names = " and ".join(f"`{name}`" for name, is_given in both.items() if is_given)
        raise ValueError(f"Expected {names} to be given to CleanImages itself, but got both, a ready one and {names}.")
    return images


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, also in a fit, which Lightning ends otherwise."""
    try:
        with own_interrupts():
            yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from end
        raise


def _chain(
    run: Cleaning, teacher_steps: int, student_steps: int, scan: bool, trust: bool, described: Mapping[str, Any]
) -> dict[str, Any]:
    """All steps, and what came of them."""
    run.check_classes(trust)
    scans = {"before": run.scan("before", run.network)} if scan else {}
    teacher = run.teach(teacher_steps)
    last, role, files = teacher, "teacher", {"cleaned": teacher["file"]}
    curves = list(teacher["curve"])
    if teacher["verdict"] != "rejected":
        teacher, last = _aligned(run, teacher, teacher_steps, student_steps)
        role, files = "student", {"teacher": teacher["file"], "cleaned": last["file"]}
        curves = [*teacher["curve"], *last["curve"]]
    if scan:
        scans["after"] = run.scan("after", run.with_weights(last["file"]))
    if last["verdict"] == "unknown":
        run.warnings.append(last["sentence"])

    def work() -> dict[str, Any]:
        normalized = _normalization(run.network)
        chosen = last["chosen"] | {f"teacher_{name}": teacher["chosen"][name] for name in ("rate", "steps")}
        asked = student_steps if role == "student" else teacher_steps
        why = reasons(chosen, run.data, asked, role, teacher["tried"], max_loss=run.max_loss)
        return {
            "accuracy": run.accuracies(files),
            "scan": scans,
            "chosen": {**chosen, "reasons": why},
            "warnings": run.warnings,
            "weights": {**outcome(last, role), **described, **normalized, "size": list(run.data.image_shape)},
            "classes": run.data.classes,
            "curves": curves,
            "provenance": {name: run.chain.arguments[name] for name in ("weights", "images", "images_hash")},
            "versions": versions(),
            "seconds": run.chain.seconds,
            "seed": run.seed,
        }

    report: dict[str, Any] = run.chain.step("report", work)
    return report


def _aligned(
    run: Cleaning, teacher: dict[str, Any], teacher_steps: int, student_steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student and its teacher, a gentler one where the student of the first lost too much; and unlearning.

    Where nothing shows a backdoor, half of the student is safer than all of it. So if half lost too much, a gentler
    teacher is asked for first, if perturbed features make gentle ones good.
    """
    whole = not teachers_latent_share(len(run.data.training))
    last = run.align(run.with_weights(teacher["file"]), teacher["chosen"]["rate"], student_steps, whole=whole)
    if last["verdict"] == "rejected" and len(run.data.held_out):
        gentler = run.teach_gentler(teacher_steps, teacher)
        if gentler is None:
            teacher = {**teacher, "tried": [*teacher["tried"], _NO_GENTLER]}
        else:
            before, now = (one["chosen"]["rate"] for one in (teacher, gentler))
            run.warnings.append(
                f"What came of the teacher at rate {before:g} lost more clean accuracy than `max_loss` allows, so one "
                f"at rate {now:g} took its place. Nothing shows that it has forgotten as much, so more of a backdoor "
                "may be left. A larger `max_loss` keeps the stronger one."
            )
            teacher = gentler
        if gentler is not None or not (whole or last["chosen"].get("suspected")):
            last = run.align(run.with_weights(teacher["file"]), teacher["chosen"]["rate"], student_steps, again=True)
    if last["verdict"] != "rejected" and last["to_unlearn"]:
        last = run.unlearn(run.with_weights(teacher["file"]), last)
    if teacher["left"] > MAY_BE_LEFT:
        run.warnings.append(_LEFT.format(teacher["chosen"]["rate"], 100 * teacher["left"]))
    return teacher, run.judge_fitted(last)


def _identity(network: nn.Module, data: CleanImages) -> dict[str, Any]:
    """What tells this network and these images from others."""
    return {
        "network": type(bare(network)).__name__,
        "weights": fingerprint(network),
        **_normalization(network),
        "images": str(data.root),
        "images_hash": data.fingerprint(),
        "image_shape": list(data.image_shape),
        "images_used": len(data.training) + len(data.held_out),
        "images_seed": data.seed,
        "held_out": len(data.held_out),
        "batch_size": data.batch_size,
        "augment": [data.augment.padding, data.augment.flip],
    }


def _normalization(network: nn.Module) -> dict[str, list[float]]:
    if not isinstance(network, Normalized):
        return {}
    return {name: [round(v, 6) for v in getattr(network, name).flatten().tolist()] for name in ("mean", "std")}


@rank_zero_only
def _finish(report: dict[str, Any], folder: Path, show: bool) -> None:
    """Write the report and say how it ended."""
    write_json(folder / "report.json", report)
    page, missing = page_of(folder)
    shutil.rmtree(folder / "fits", ignore_errors=True)
    weights, figures = report["weights"], report["accuracy"]
    for warning in [*report["warnings"], *([missing] if missing else [])]:
        say(f"Note: {warning}", show)
    for name, entry in figures.items():
        seen = "held-out images" if entry["held_out"] else "images, also those of the fits"
        ends = interval(Accuracy(entry["value"], entry["standard_error"], entry["images"], None, {}))
        between = "" if ends is None else f" (95 %: {100 * ends[0]:.1f} to {100 * ends[1]:.1f})"
        say(f"{name:>10}: {100 * entry['value']:5.1f} %{between} of {entry['images']} {seen}", show)
    if not weights["handed_over"]:
        say(f"{weights['reason']} {weights['next']}", show)
    for path in (folder / weights["file"], folder / "report.json", *([page] if page else [])):
        say(str(path), show)
