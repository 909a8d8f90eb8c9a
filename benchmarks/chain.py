"""The fits of a defence: its teacher first, if the method asks for one, at rates that are given or found."""

import argparse
import math
from pathlib import Path
from typing import Any

from common import config, merged
from keeping import Kept, Subject, check_finite, kept_fit, kind_of, lengthened, needs_teacher, teacher_config
from rates import MAX_LOSS, accuracy_of, at_rate, swept
from teachers import Teachers
from torch import nn

from nba_lightning.training.sweep import (
    STUDENT_SHARE,
    UNLEARNING_STEPS,
    keeps,
    may_replace,
    teachers_latent_share,
    teachers_loss,
    teachers_mixed_share,
    unlearning_rate,
    usual_optimizer,
)
from nba_lightning.training.verification import Verification


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
        asked = teacher_config(found, subject.images)
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
    comes of it lost too much, a teacher that did not takes its place; where features were perturbed only then may all
    of a student be kept that nothing is seen in. What reaches classes that verification suspected is unlearned, or any
    class.
    """
    asked = lengthened(teacher_config(found, subject.images), subject.images)
    asked = merged(asked, {"model": {"init_args": {"mixed_share": teachers_mixed_share(subject.images)}}})
    cost, teachers = Kept(None), dict[float, Kept]()
    images, baseline = len(subject.datamodule.partition.validation), accuracy_of(subject, subject.weights)
    verified = Verification().can_tell(subject.images)
    perturbed = teachers_latent_share(subject.images) > 0
    for max_loss in (teachers_loss(MAX_LOSS), MAX_LOSS):
        teacher = swept(args, asked, subject, max_loss, teachers)
        check_finite(teacher)
        sweep = Teachers(args, asked, found, subject, teachers, teacher)
        if verified:
            sweep.try_gentler()
        rate, first = sweep.taken(max_loss), cost.sweeps.get("FineTuning", {}).get("taken", math.inf)
        if rate >= first and (not perturbed or cost.sweeps["verification"]["suspected"]):
            break  # there is none that is gentler
        rate = min(rate, first)
        given = taught_by(found, teachers[rate])
        if perturbed and first == math.inf:
            given = merged(given, {"model": {"init_args": {"verification": {"init_args": {"whole": False}}}}})
        student = kept_fit(args, at_rate(given, STUDENT_SHARE * rate, subject), subject)
        check_finite(student)
        cost.add(teacher)
        cost.add(student)
        cost.path, cost.sweeps["FineTuning"]["taken"] = student.path, rate
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
    told = {"taken": taken, "before": round(before, 4), "after": round(after, 4)}
    cost.sweeps["unlearning"] = {**cost.sweeps.get("unlearning", {}), **told}
    cost.path = fit.path if taken else cost.path
