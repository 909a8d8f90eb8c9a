"""The teacher of the chain: which of several rates it is fine-tuned with."""

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from nba_lightning.pseudo import LatentPerturbations, TriggerFamilies
from nba_lightning.training.sweep import (
    MAY_BE_LEFT,
    RATES,
    USUAL_RATE,
    gentler_rates,
    keeps,
    most_accurate,
    next_rate,
    rate_between,
    strongest_rate,
    teachers_latent_share,
    teachers_mixed_share,
    usual_optimizer,
    witness_rate,
)
from nba_lightning.training.verification import Verification


@dataclass
class Tried:
    """The fits of a sweep, by rate.

    Attributes:
        found: what came of each.
        right: its accuracy on held-out images, in [0, 1]; 0 where the loss became infinite.
        affordable: whether it lost no more than it may.
        before: accuracy of the suspicious network.
        images: how many were held out.
    """

    found: dict[float, dict[str, Any]] = field(default_factory=dict)
    right: dict[float, float] = field(default_factory=dict)
    affordable: dict[float, bool] = field(default_factory=dict)
    before: float = 0.0
    images: int = 0

    def add(self, rate: float, found: dict[str, Any], max_loss: float) -> None:
        """Judge one more."""
        self.found[rate], self.right[rate], figures = found, 0.0, found["accuracies"]
        if "student" in figures:  # not where the loss became infinite
            self.before, self.images = figures["suspicious"]["value"], figures["suspicious"]["images"]
            self.right[rate] = figures["student"]["value"]
        good = found["verdict"] != "rejected"  # a small loss of many images may be beyond chance
        kept = bool(self.images) and good and keeps(self.right[rate], self.before, self.images, max_loss)
        self.affordable[rate] = kept

    def strongest(self, max_loss: float) -> float:
        """The strongest rate that is affordable, or else that of those which lost hardly more than the least."""
        if not self.images:
            return min(self.found)
        able = {rate: self.right[rate] for rate, good in self.affordable.items() if good} or self.right
        return strongest_rate(able, self.before, self.images, max_loss)

    def witness(self, strongest: float) -> float | None:
        """The rate whose network bears witness to what the strongest that is affordable has kept, if there is one."""
        return witness_rate(self.right, strongest, self.before)

    def figures(self, rate: float) -> str:
        """Accuracy at a rate beside the suspicious network's."""
        now, before = 100 * self.right[rate], 100 * self.before
        return f"{now:.1f} % of the held-out images right, the suspicious network {before:.1f}"

    def verdict(self, rate: float) -> str:
        """What is said of a rate that was just tried."""
        if self.found[rate]["file"] is None:
            return "the loss became infinite"
        return f"{self.figures(rate)}: {'affordable' if self.affordable[rate] else 'too much is lost'}"

    def reason(self, rate: float, equal: Sequence[float]) -> str:
        """Why it was not taken, where those in ``equal`` withstand what the strongest withstands."""
        if self.found[rate]["file"] is None:
            why = "the loss became infinite"
        elif not self.affordable[rate]:
            why = f"it lost too much accuracy ({self.figures(rate)})"
        elif rate in equal:
            why = f"another one withstands as much and lost no more accuracy ({self.figures(rate)})"
        else:
            why = f"nothing shows that it withstands what a stronger one does ({self.figures(rate)})"
        return f"A teacher fine-tuned at rate {rate:g} was not taken: {why}."


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
    strongest withstands the most accurate one is. A still stronger one that lost too much accuracy bears witness to
    what the strongest has kept of the backdoor; if it has kept some, a rate between both is tried too. Without held-out
    images nothing tells rates apart, and the usual one is taken.

    Returns:
        What came of the chosen fit, whose weights :func:`take_teacher` brings to the output folder, with the share
        ``left`` of the backdoor that the witness found; and by rate a sentence for each that was not chosen.
    """
    kind, tried = usual_optimizer(network), Tried()
    rates = RATES[kind] if held_out else (USUAL_RATE[kind],)

    def attempt(rate: float) -> Link:
        one = link(f"teacher {rate:g}")
        tried.add(rate, chain.step(one.name, partial(_try, network, one, rate, seed, show)), max_loss)
        remove_file(one.folder / "last.ckpt")  # several times the network on the disk
        say(f"  rate {rate:g}: {tried.verdict(rate)}", show and held_out)
        return one

    while (rate := next_rate(rates, tried.affordable)) is not None:
        one = attempt(rate)
    strongest = tried.strongest(max_loss)
    if tried.found[strongest]["file"] is None:
        raise NonFiniteLossError(tried.found[strongest]["sentence"])
    if Verification().can_tell(len(one.data.training)):
        for rate in gentler_rates(rates, tried.found, strongest):
            attempt(rate)

    witness = tried.witness(strongest)
    bearing = None if witness is None else tried.found[witness]["file"]

    def compared() -> dict[str, Any]:
        able = {
            rate: found["file"]
            for rate, found in sorted(tried.found.items())[::-1]
            if rate <= strongest and found["file"] is not None
        }
        work = partial(_withstanding, network, able, bearing, one, chain, seed, show)
        answer: dict[str, Any] = chain.step(f"withstanding of {strongest:g}", work)
        return answer

    found = compared()
    if found["left"] > MAY_BE_LEFT and witness is not None:
        say(f"  that of rate {strongest:g} has kept about {100 * found['left']:.0f} % of the backdoor", show)
        attempt(rate_between(strongest, witness))
        strongest, before = tried.strongest(max_loss), strongest
        found = found if strongest == before else compared()
    chosen = most_accurate({rate: tried.right[rate] for rate in found["equal"]})
    others = sorted(tried.found.keys() - {chosen}, reverse=True)
    told = {rate: tried.reason(rate, found["equal"]) for rate in others}
    return {**tried.found[chosen], "left": found["left"]}, told


def take_teacher(found: dict[str, Any], chain: Chain) -> dict[str, Any]:
    """Bring a chosen teacher's weights to the output folder, as ``teacher.safetensors`` or ``rejected.safetensors``."""
    name = "rejected.safetensors" if found["verdict"] == "rejected" else "teacher.safetensors"
    source = chain.folder / "fits" / found["file"]
    chain.step(f"take {found['chosen']['rate']:g}", lambda: _take(source, chain.folder / name))
    return {**found, "file": name}


def _withstanding(
    network: nn.Module,
    files: dict[float, str],
    witness: str | None,
    link: Link,
    chain: Chain,
    seed: int,
    show: bool,
) -> dict[str, Any]:
    """The rates of the teachers that withstand what the strongest one, the first, withstands, and what it has kept."""
    device = link.places.device()
    rates, verification = list(files), Verification()
    if not verification.can_compare(len(rates), witness is not None, len(link.data.training)):
        return {"equal": rates[:1], "left": 0.0}
    passes = verification.passes_of_comparing(link.data.num_classes, len(link.data.training), len(rates))
    say(f"  what do the teachers withstand? At most {passes:,} passes of an image", show)

    def fitted(file: str) -> nn.Module:
        made = copy.deepcopy(network).to(device)
        load_weights(made, chain.folder / "fits" / file)
        return made

    seen = link.data.training[shuffled(len(link.data.training), seed, 31)][: verification.search.images]
    parts = torch.split(link.data.images_at(seen).images.to(device), link.batch)
    batches = (part.float() / 255 for part in cycle(parts))
    came = copy.deepcopy(network).to(device)
    generator = generator_for(seed, 8, device=device)
    places, left = verification.withstanding(
        [fitted(file) for file in files.values()],
        came,
        batches,
        len(parts),
        generator,
        None if witness is None else fitted(witness),
    )
    return {"equal": [rates[place] for place in places], "left": left}


def _try(network: nn.Module, link: Link, rate: float, seed: int, show: bool) -> dict[str, Any]:
    """A teacher of one rate; weights stay in the link's folder."""
    say(f"  fine-tuning at rate {rate:g}: {link.cost()}", show)
    images = len(link.data.training)
    shares = {"mixed_share": teachers_mixed_share(images), "latent_share": teachers_latent_share(images)}
    asked: dict[str, Any] = {"pseudo": TriggerFamilies(), "latent": LatentPerturbations(), **shares, "seed": seed}
    module = FineTuning(copy.deepcopy(network), **asked, **optimizer_for(network, rate))
    try:
        found = link.fit(module, link.folder / "teacher.safetensors")
    except NonFiniteLossError as error:
        nothing: dict[str, Any] = {"curve": [], "chosen": {"rate": rate, "steps": 0}, "file": None, "accuracies": {}}
        return {"verdict": "rejected", "sentence": str(error), **nothing}
    return {**found, "file": f"{link.folder.name}/{found['file']}"}


@rank_zero_only
def _take(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)
