"""The teacher of the chain: which of several rates it is fine-tuned with."""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from nba_lightning.app.chain import Chain, remove_file, say
from nba_lightning.app.fits import Link, optimizer_for
from nba_lightning.callbacks import NonFiniteLossError
from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.defenses import FineTuning
from nba_lightning.io.weights import load_weights
from nba_lightning.pseudo import TriggerFamilies
from nba_lightning.training.sweep import (
    RATES,
    USUAL_RATE,
    keeps,
    most_accurate,
    next_rate,
    strongest_rate,
    usual_optimizer,
)
from nba_lightning.training.verification import Verification


def fit_teacher(
    network: nn.Module,
    link: Callable[[str], Link],
    chain: Chain,
    max_loss: float,
    held_out: bool,
    seed: int,
    show: bool,
) -> tuple[dict[str, Any], dict[float, str]]:
    """Fine-tune copies of the network on synthetic triggers too, as strongly as accuracy allows and removal needs.

    Which rates are tried says :mod:`nba_lightning.training.sweep`; of those that may be taken and withstand what the
    strongest withstands the most accurate one is. Without held-out images nothing tells them apart, and the usual one
    is taken.

    Returns:
        What came of the chosen fit, whose weights :func:`take_teacher` brings to the output folder, and by rate a
        sentence for each that was not chosen.
    """
    tried, measured, kept = dict[float, dict[str, Any]](), dict[float, float](), dict[float, bool]()
    before, images = 0.0, 0
    kind = usual_optimizer(network)
    rates = RATES[kind] if held_out else (USUAL_RATE[kind],)
    while (rate := next_rate(rates, kept)) is not None:
        one = link(f"teacher {rate:g}")
        tried[rate] = chain.step(one.name, partial(_try, network, one, rate, seed, show))
        measured[rate], figures = 0.0, tried[rate]["accuracies"]
        if "student" in figures:  # not where the loss became infinite
            before, images = figures["suspicious"]["value"], figures["suspicious"]["images"]
            measured[rate] = figures["student"]["value"]
        good = tried[rate]["verdict"] != "rejected"  # a small loss of many images may be beyond chance
        kept[rate] = bool(images) and good and keeps(measured[rate], before, images, max_loss)
        remove_file(one.folder / "last.ckpt")  # several times the network on the disk
        said = f"{_right(measured[rate], before)}: {'affordable' if kept[rate] else 'too much is lost'}"
        said = said if tried[rate]["file"] else "the loss became infinite"
        say(f"  rate {rate:g}: {said}", show and held_out)
    affordable = {rate: measured[rate] for rate in kept if kept[rate]} or measured
    strongest = strongest_rate(affordable, before, images, max_loss) if images else next(iter(tried))
    if tried[strongest]["file"] is None:
        raise NonFiniteLossError(tried[strongest]["sentence"])
    able = {rate: tried[rate]["file"] for rate in sorted(kept)[::-1] if rate <= strongest and tried[rate]["file"]}
    equal = chain.step(f"equal to {strongest:g}", partial(_withstanding, network, able, one, chain, seed, show))
    chosen = most_accurate({rate: measured[rate] for rate in equal})
    told = {}
    for rate in sorted(tried.keys() - {chosen}, reverse=True):
        right = _right(measured[rate], before)
        if tried[rate]["file"] is None:
            why = "the loss became infinite"
        elif not kept[rate]:
            why = f"it lost too much accuracy ({right})"
        elif rate in equal:
            why = f"another one withstands as much and lost no more accuracy ({right})"
        else:
            why = f"nothing shows that it withstands what a stronger one does ({right})"
        told[rate] = f"A teacher fine-tuned at rate {rate:g} was not taken: {why}."
    return tried[chosen], told


def take_teacher(found: dict[str, Any], chain: Chain) -> dict[str, Any]:
    """Bring a chosen teacher's weights to the output folder, as ``teacher.safetensors`` or ``rejected.safetensors``."""
    name = "rejected.safetensors" if found["verdict"] == "rejected" else "teacher.safetensors"
    source = chain.folder / "fits" / found["file"]
    chain.step(f"take {found['chosen']['rate']:g}", lambda: _take(source, chain.folder / name))
    return {**found, "file": name}


def _right(share: float, before: float) -> str:
    return f"{100 * share:.1f} % of the held-out images right, the suspicious network {100 * before:.1f}"


def _withstanding(
    network: nn.Module, files: dict[float, str], link: Link, chain: Chain, seed: int, show: bool
) -> list[float]:
    """The rates of the teachers that withstand what the strongest one, the first, withstands."""
    device = link.places.device()
    rates, verification = list(files), Verification()
    if len(rates) == 1 or len(link.data.training) < verification.least_images:
        return rates[:1]
    passes = verification.search.passes(link.data.num_classes, len(link.data.training), len(rates))
    say(f"  do gentler teachers withstand as much? At most {passes:,} passes of an image", show)
    teachers = []
    for file in files.values():
        teachers.append(copy.deepcopy(network).to(device))
        load_weights(teachers[-1], chain.folder / "fits" / file)
    seen = link.data.training[shuffled(len(link.data.training), seed, 31)][: verification.search.images]
    parts = torch.split(link.data.images_at(seen).images.to(device), link.batch)
    batches = (part.float() / 255 for part in cycle(parts))
    came = copy.deepcopy(network).to(device)
    generator = generator_for(seed, 8, device=device)
    return [rates[place] for place in verification.withstanding(teachers, came, batches, len(parts), generator)]


def _try(network: nn.Module, link: Link, rate: float, seed: int, show: bool) -> dict[str, Any]:
    """A teacher of one rate; weights stay in the link's folder."""
    say(f"  fine-tuning at rate {rate:g}: {link.cost()}", show)
    module = FineTuning(copy.deepcopy(network), pseudo=TriggerFamilies(), seed=seed, **optimizer_for(network, rate))
    try:
        found = link.fit(module, link.folder / "teacher.safetensors")
    except NonFiniteLossError as error:
        nothing: dict[str, Any] = {"curve": [], "chosen": {"rate": rate, "steps": 0}, "file": None, "accuracies": {}}
        return {"verdict": "rejected", "sentence": str(error), **nothing}
    return {**found, "file": f"{link.folder.name}/{found['file']}"}


@rank_zero_only
def _take(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)
