"""The last fit of the chain: what only the suspicious network falls for is unlearned, unless it costs too much."""

import copy
import shutil
from typing import Any

from torch import nn

from nba_lightning.app.chain import Chain, copy_file, say
from nba_lightning.app.fits import Link, optimizer_for
from nba_lightning.callbacks import NonFiniteLossError
from nba_lightning.defenses import Unlearning
from nba_lightning.training.sweep import may_replace, unlearning_rate, usual_optimizer

_LEFT = (
    "What is crafted on it alone led what verification kept to {} {:.0f} % as easily as the suspicious network, so "
    "its teacher has kept the backdoor. What is crafted on the cleaned network leads there {:.0f} % as easily now, and "
    "what else is left nothing shows. A larger `max_loss`, or more clean images, make a stronger teacher."
)
_NO_GUIDE = (
    "; the teacher was no guide, since what is crafted on it alone led what was kept there {:.0f} % as easily as the "
    "suspicious network, so all of the way was kept"
)


def fit_unlearning(
    network: nn.Module,
    teacher: nn.Module,
    student: nn.Module,
    last: dict[str, Any],
    link: Link,
    chain: Chain,
    seed: int,
    show: bool,
) -> dict[str, Any]:
    """Unlearn what reaches the classes that are suspected, or all, and take what comes of it unless it lost too much.

    Args:
        network: the suspicious network.
        teacher: what the student was aligned with.
        student: what verification kept of it.
        last: what came of the student's fit.
        link: of this fit.
        chain: what is done; ``cleaned.safetensors`` in its folder is replaced.
        seed: of this fit.
        show: whether to print.

    Returns:
        ``last`` with what came of it; ``warnings`` are of this fit.
    """
    rate = unlearning_rate(last["chosen"]["rate"], usual_optimizer(network))
    classes, known = last["to_unlearn"], ", ".join(last["chosen"].get("suspected", []))

    def warnings(module: Unlearning, left: float) -> list[str]:
        return [] if module.guided else [_LEFT.format(known, 100 * module.reached, 100 * left)]

    def nothing(why: str, module: Unlearning) -> dict[str, Any]:
        told = {**last["chosen"], "unlearned": f"nothing: {why}"}
        return {"chosen": told, "curve": [], "warnings": warnings(module, module.reached)}

    def work() -> dict[str, Any]:
        own: dict[str, Any] = {"teacher": teacher, "start": student, "classes": classes, "seed": seed}
        module = Unlearning(copy.deepcopy(network), **own, **optimizer_for(network, rate))
        say(f"  {link.cost()}", show)
        try:
            found = link.fit(module, link.folder / "unlearned.safetensors")
        except NonFiniteLossError as error:
            return nothing(str(error), module)
        if found["verdict"] == "rejected" or not _good(found["accuracies"], last["accuracies"], link.max_loss):
            return nothing(f"it cost too much accuracy. {found['sentence']}", module)
        copy_file(link.folder / found["file"], chain.folder / last["file"])
        reached = known or f"any of {len(classes)} classes"
        told = f"what reaches {reached}, in {found['chosen']['steps']} steps at rate {rate:g}"
        if not module.guided:
            told += _NO_GUIDE.format(100 * module.reached)
        taken = {name: found[name] for name in ("verdict", "sentence", "accuracies", "curve")}
        said = warnings(module, module.left)
        return {**taken, "chosen": {**last["chosen"], "unlearned": told}, "warnings": said}

    found: dict[str, Any] = chain.step(link.name, work)
    shutil.rmtree(link.folder, ignore_errors=True)
    say(f"  unlearned: {found['chosen']['unlearned']}", show)
    return {**last, **found, "curve": [*last["curve"], *found["curve"]]}


def _good(figures: dict[str, Any], before: dict[str, Any], max_loss: float) -> bool:
    """Whether it may take the student's place, as far as held-out images tell."""
    if "student" not in figures or "student" not in before:
        return True
    came = figures["suspicious"]
    return may_replace(figures["student"]["value"], before["student"]["value"], came["value"], came["images"], max_loss)
