"""Whether a network that learned from the suspicious one has learned its backdoor too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.pseudo.class_perturbations import ClassPerturbations
from nba_lightning.pseudo.trigger_families import TriggerFamilies


@dataclass
class Evidence:
    """What the suspicious network falls for and the teacher withstands.

    Attributes:
        classes: `(K,)` the classes that were looked at.
        bank: `(K, C, H, W)` a perturbation for each of them.
        suspects: `(K,)` bool.
        images: batches of clean images on which falling is measured.
        few: how many of these batches are enough for a class that is not suspected.
        said: what the suspicious network says to the clean images, batch by batch.
        taught: `(K,)` share of the images that each perturbation wins from the teacher.
        allowed: `(K,)` the share that it may win from a network that is kept.
        agreed: share of the clean images to which the teacher says what the suspicious network says.
        rates: shares that were won, of every network that was asked, by its name.
    """

    classes: Tensor
    bank: Tensor
    suspects: Tensor
    images: list[Tensor]
    few: int
    said: list[Tensor]
    taught: Tensor = field(default_factory=lambda: torch.empty(0))
    allowed: Tensor = field(default_factory=lambda: torch.empty(0))
    agreed: float = 0.0
    rates: dict[str, list[float]] = field(default_factory=dict)


class Verification:
    r"""Keep as much of what a student learned as shows no sign of the backdoor, without knowing a trigger.

    For each class k a small universal perturbation :math:`d_k` is crafted that the suspicious network falls for and the
    teacher withstands. A backdoor makes the target class easy to reach, and a network that has learned it falls for
    :math:`d_k` too. The *gap* of a class is on how many more of the images :math:`d_k` wins it from the suspicious
    network than from the teacher. Perturbations grow through ``sizes`` until the teacher falls for them on
    ``suspected`` of the images itself; those count whose largest gap is furthest ahead of the next. A class is
    *suspected* if its gap is above ``suspected`` and above half of the largest.

    Networks lie on a way from the teacher T over the student S towards the
    suspicious network :math:`S_0`,

    .. math:: T + r (S - T) \quad (r \le 1), \qquad S + (r - 1) (S_0 - S) \quad (r > 1)

    and of those with r from ``shares`` the first is kept from which no suspected class wins more images than from the
    teacher, but for ``margin`` of its gap, and no other class more than ``margin_elsewhere`` of the images or half of
    its gap; on models with known triggers that share of the gap was about the share of the ASR that was back. r is 0,
    and the student the teacher, if none does. It must also agree with the suspicious network on clean images as often
    as the teacher does: weights that are far apart may have nothing but ruins between them. Where no class is
    suspected, nothing beyond the student is tried: what cannot be seen is not asked for. BatchNorm statistics are mixed
    like the weights; estimated anew on plain images they would not be those of the mixture with pseudo samples on which
    all were learned.

    Ours; the thresholds were found on three models (``benchmarks/METHOD.md``). Weights between two networks that were
    fine-tuned from one another are as in Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022 (arXiv
    2109.01903), section 3. What it cannot see: a backdoor whose trigger no small perturbation of the image resembles.

    Args:
        shares: r in (0, 2], from the largest to the smallest.
        suspected: see above; a share of the images, in [0, 1].
        margin: see above; a share of the gap, in [0, 1].
        margin_elsewhere: see above; a share of the images.
        sizes: bounds on the root mean square of a perturbation, in units of the image range [0, 1], rising.
        steps: gradient steps of crafting, one batch each.
        images_each: clean images for each perturbation in a step.
        images: clean images of each process on which falling for a suspected class is measured, if there are so many.
        images_elsewhere: likewise, for other classes.
        classes: how many classes are looked at in a network that has more; those to which synthetic triggers move the
            suspicious network most and the teacher least.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        shares: Sequence[float] = (1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25),
        suspected: float = 0.2,
        margin: float = 0.015,
        margin_elsewhere: float = 0.1,
        sizes: Sequence[float] = (0.018, 0.036, 0.072, 0.144),
        steps: int = 16,
        images_each: int = 24,
        images: int = 2000,
        images_elsewhere: int = 400,
        classes: int = 32,
    ) -> None:
        for share in shares:
            check_range("shares", share, 0.0, 2.0, open_low=True)
        if sorted(shares, reverse=True) != list(shares):
            raise expected("shares", "from the largest to the smallest", list(shares))
        shares_of = {"suspected": suspected, "margin": margin, "margin_elsewhere": margin_elsewhere}
        for name, value in shares_of.items():
            check_range(name, value, 0.0, 1.0)
        for name, number in {"images": images, "images_elsewhere": images_elsewhere, "classes": classes}.items():
            check_at_least(name, number, 1)
        self.shares, self.images, self.images_elsewhere = list(shares), images, images_elsewhere
        self.suspected, self.margin, self.margin_elsewhere = suspected, margin, margin_elsewhere
        if not sizes or sorted(sizes) != list(sizes):
            raise expected("sizes", "at least one bound, rising", list(sizes))
        self.sizes, self.steps, self.images_each, self.classes = list(sizes), steps, images_each, classes
        self.rates: dict[str, list[float]] = {}

    def passes_over_images(self, classes: int, images: int) -> int:
        """About how many times as many images as there are go forward or backward, for the cost that is stated."""
        looked_at = min(classes, self.classes)
        crafted = 4 * self.steps * looked_at * self.images_each * len(self.sizes)
        measured = (len(self.shares) + 3) * (looked_at * min(self.images_elsewhere, images) + min(self.images, images))
        return round((crafted + measured) / images)

    def keep(
        self,
        student: nn.Module,
        teacher: nn.Module,
        suspicious: nn.Module,
        batches: Iterator[Tensor],
        one_pass: int,
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> float:
        """Leave in ``student`` what passes.

        Args:
            student: what learned from the suspicious network; changed in place.
            teacher: of the same architecture; what the student started from.
            suspicious: the suspicious network.
            batches: endless clean images `(B, C, H, W)` in [0, 1].
            one_pass: after how many batches they come again.
            generator: source of randomness, the same on all processes.
            reduce: averages a tensor over all processes.

        Returns:
            r. How often each class won stands in ``rates``.
        """
        evidence = self.look(suspicious, teacher, batches, one_pass, generator, reduce)
        learned = {name: value.clone() for name, value in student.state_dict().items()}
        furthest = 2.0 if bool(evidence.suspects.any()) else 1.0
        for share in (*(one for one in self.shares if one <= furthest), 0.0):
            if share > 1:
                _set_between(student, learned, suspicious.state_dict(), share - 1)
            else:
                _set_between(student, teacher.state_dict(), learned, share)
            if self.withstands(student, evidence, f"{share:g}", reduce):
                break
        self.rates = evidence.rates
        rank_zero_info(_sentence(share, evidence))
        return share

    def look(
        self,
        suspicious: nn.Module,
        teacher: nn.Module,
        batches: Iterator[Tensor],
        one_pass: int,
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> Evidence:
        """Craft the perturbations; see :meth:`keep`."""
        first = next(batches)
        looked_at = [first, *islice(batches, min(one_pass - 1, (self.images - 1) // len(first)))]
        few = 1 + (self.images_elsewhere - 1) // len(first)
        classes = self._most_moved(suspicious, teacher, looked_at[:few], generator, reduce)
        bank, gaps, most = torch.empty(0), torch.zeros(len(classes)), -torch.inf
        for size in self.sizes:
            crafting = ClassPerturbations((size,), self.steps, self.images_each, classes.tolist())
            crafting.regenerate(suspicious, teacher, batches, generator, reduce)
            taught, came_in = (
                _rates(network, looked_at[:few], classes, crafting.bank, reduce) for network in (teacher, suspicious)
            )
            stands_out = _lead(came_in - taught)
            if stands_out > most:
                bank, gaps, most = crafting.bank, came_in - taught, stands_out
            if bool((taught > self.suspected).any()):
                break
        suspects = gaps > torch.clamp(gaps.max() / 2, min=self.suspected)
        with torch.no_grad(), evaluating(suspicious):
            said = [predict(suspicious, images).argmax(dim=1) for images in looked_at]
        evidence = Evidence(classes, bank, suspects, looked_at, few, said)
        evidence.taught = self._measure(teacher, evidence, "teacher", reduce)
        gaps = (self._measure(suspicious, evidence, "suspicious", reduce) - evidence.taught).clamp(min=0.0)
        evidence.allowed = evidence.taught + torch.where(
            suspects, self.margin * gaps, (gaps / 2).clamp(min=self.margin_elsewhere)
        )
        evidence.agreed = _agreement(teacher, evidence, reduce)
        return evidence

    def withstands(self, network: nn.Module, evidence: Evidence, name: str, reduce: Reduce = same) -> bool:
        """Whether a network withstands what the teacher withstands, but for the margins.

        Args:
            network: the network.
            evidence: of :meth:`look`.
            name: of the network in ``evidence.rates``.
            reduce: averages a tensor over all processes.
        """
        if name == "0":  # the teacher itself
            return True
        if _agreement(network, evidence, reduce) < evidence.agreed - 0.01:
            return False
        return bool((self._measure(network, evidence, name, reduce) <= evidence.allowed + 1e-6).all())

    def _measure(self, network: nn.Module, evidence: Evidence, name: str, reduce: Reduce) -> Tensor:
        """How often each class wins `(K,)`; suspected ones on more images."""
        rates = _rates(network, evidence.images[: evidence.few], evidence.classes, evidence.bank, reduce)
        suspects = evidence.suspects
        if bool(suspects.any()) and len(evidence.images) > evidence.few:
            rates[suspects] = _rates(
                network, evidence.images, evidence.classes[suspects], evidence.bank[suspects], reduce
            )
        evidence.rates[name] = rates.tolist()
        return rates

    @torch.no_grad()
    def _most_moved(
        self,
        suspicious: nn.Module,
        teacher: nn.Module,
        batches: Sequence[Tensor],
        generator: torch.Generator | None,
        reduce: Reduce,
    ) -> Tensor:
        """All classes, or of many the ones to which synthetic triggers move the suspicious network most."""
        with evaluating(suspicious, teacher):
            number = predict(suspicious, batches[0][:1]).shape[1]
            if number <= self.classes:
                return torch.arange(number, device=batches[0].device)
            triggers = TriggerFamilies()
            moved = torch.zeros(number, device=batches[0].device)
            for images in batches:
                triggered = (images + triggers(images, generator=generator)).clamp(0.0, 1.0).to(images.dtype)
                came, taught = (predict(one, triggered).float().softmax(dim=1) for one in (suspicious, teacher))
                moved += (came - taught).mean(dim=0)
        return reduce(moved).topk(self.classes).indices.sort().values


def _lead(gaps: Tensor) -> float:
    """How far the largest gap is ahead of the next."""
    first = gaps.topk(min(2, len(gaps))).values
    return float(first[0] - first[1:].sum())


@torch.no_grad()
def _agreement(network: nn.Module, evidence: Evidence, reduce: Reduce) -> float:
    """Share of the clean images to which a network says what the suspicious one says."""
    with evaluating(network):
        agrees = [predict(network, x).argmax(dim=1) == y for x, y in zip(evidence.images, evidence.said, strict=True)]
    return float(reduce(torch.cat(agrees).float().mean()))


@torch.no_grad()
def _rates(network: nn.Module, batches: Sequence[Tensor], classes: Tensor, bank: Tensor, reduce: Reduce) -> Tensor:
    """Share of the images `(K,)` that each class's perturbation wins for its class, of those not in it anyway."""
    won, seen = torch.zeros(len(bank), device=bank.device), torch.zeros(len(bank), device=bank.device)
    with evaluating(network):
        for images in batches:
            before = predict(network, images).argmax(dim=1)
            for k, (wanted, perturbation) in enumerate(zip(classes, bank, strict=True)):
                inputs = (images + perturbation).clamp(0.0, 1.0).to(images.dtype)
                others = before != wanted
                won[k] += ((predict(network, inputs).argmax(dim=1) == wanted) & others).sum()
                seen[k] += others.sum()
    return reduce(won) / reduce(seen).clamp(min=1e-12)


@torch.no_grad()
def _set_between(network: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> None:
    """Weights and statistics of ``network``: ``start`` + share * (``end`` - ``start``)."""
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(start[name].to(value.device).float(), end[name].float(), share))
        else:
            value.copy_(end[name] if share else start[name])
    torch.clear_autocast_cache()  # else what follows would run on half-precision copies of the weights before


def _sentence(share: float, evidence: Evidence) -> str:
    came_in, taught = evidence.rates["suspicious"], evidence.rates["teacher"]
    worst = max(range(len(came_in)), key=lambda k: came_in[k] - taught[k])
    kept = evidence.rates.get(f"{share:g}", taught)[worst]
    told = (
        f"small perturbations win class {int(evidence.classes[worst])} {100 * came_in[worst]:.0f} % of the images from "
        f"the suspicious network, {100 * taught[worst]:.1f} % from the teacher and {100 * kept:.1f} % from the network "
        "that is kept."
    )
    if not bool(evidence.suspects.any()):
        told += " No class stands out, so a backdoor that is there would not have been seen."
    amount = "all" if share >= 1 else "nothing" if share == 0 else f"{100 * share:.0f} %"
    more = f", and {100 * (share - 1):.0f} % of the way back to it is gone" if share > 1 else ""
    return f"Verified: {amount} of what the student learned from the suspicious network is kept{more}; {told}"
