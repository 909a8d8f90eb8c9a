"""What a suspicious network falls for and its teacher withstands: evidence of a backdoor, without a trigger."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.pseudo.class_perturbations import ClassPerturbations
from nba_lightning.pseudo.trigger_families import TriggerFamilies

_BY_NATURE = 0.05
"""Share of the images that any class may win by nature."""


@dataclass
class Evidence:
    """N perturbations, and the images on which networks are asked.

    Attributes:
        classes: `(N,)` the class that each perturbation is for; a suspected one has several.
        bank: `(N, C, H, W)` the perturbations.
        suspects: `(N,)` whether the class is suspected.
        images: batches of clean images.
        few: how many of these batches are enough for a class that is not suspected.
        reduce: averages a tensor over all processes.
        said: what the suspicious network says to the clean images, batch by batch.
        taught: `(N,)` share of the images that each perturbation wins from the teacher.
        gaps: `(N,)` share that it wins more from the suspicious network.
        rates: shares that were won, of every network that was asked, by its name.
    """

    classes: Tensor
    bank: Tensor
    suspects: Tensor
    images: list[Tensor]
    few: int
    reduce: Reduce
    said: list[Tensor] = field(default_factory=list)
    taught: Tensor = field(default_factory=lambda: torch.empty(0))
    gaps: Tensor = field(default_factory=lambda: torch.empty(0))
    rates: dict[str, list[float]] = field(default_factory=dict)

    def of(self, suspicious: nn.Module, teacher: nn.Module) -> "Evidence":
        """Ask the suspicious network and the teacher."""
        with torch.no_grad(), evaluating(suspicious):
            self.said = [predict(suspicious, images).argmax(dim=1) for images in self.images]
        self.taught = self.won(teacher, "teacher")
        self.gaps = (self.won(suspicious, "suspicious") - self.taught).clamp(min=1e-6)
        return self

    def won(self, network: nn.Module, name: str) -> Tensor:
        """Share of the images `(N,)` that each perturbation wins from a network; of suspected classes on all images."""
        rates = torch.zeros(len(self.bank), device=self.bank.device)
        for rows, images in ((self.suspects, self.images), (~self.suspects, self.images[: self.few])):
            if bool(rows.any()):
                rates[rows] = won(network, images, self.classes[rows], self.bank[rows], self.reduce)
        self.rates[name] = rates.tolist()
        return rates

    def came_back(self, network: nn.Module, name: str) -> tuple[float, float]:
        """How much of what the suspicious network falls for a network falls for.

        Returns:
            The largest share of a suspected class's gap, the mean over its perturbations; and of the other classes the
            largest share of the images beyond the teacher's and beyond half of the gap.
        """
        more = self.won(network, name) - self.taught
        ratio, suspects = more / self.gaps, self.suspects
        numbers = sorted(set(self.classes[suspects].tolist()))
        back = [float(ratio[suspects & (self.classes == number)].mean()) for number in numbers]
        others = (more - self.gaps / 2)[~suspects]
        elsewhere = torch.where(others > 0, more[~suspects], 0.0)
        return max(back, default=0.0), float(elsewhere.max()) if len(elsewhere) else 0.0

    @torch.no_grad()
    def agreement(self, network: nn.Module) -> float:
        """Share of the clean images to which a network says what the suspicious one says."""
        with evaluating(network):
            agrees = [predict(network, x).argmax(dim=1) == y for x, y in zip(self.images, self.said, strict=True)]
        return float(self.reduce(torch.cat(agrees).float().mean()))


class Search:
    r"""Search for a class that is reached unusually easily from the suspicious network, and not from the teacher.

    For each class k a small universal perturbation :math:`d_k` is crafted that the suspicious network falls for and the
    teacher withstands. The *gap* of a class is on how many more of the images :math:`d_k` wins it from the suspicious
    network (a share s) than from the teacher (t); it stands out by

    .. math:: (s - t) / (t + 0.05)

    since a class that the teacher falls for as well is near by nature. Perturbations grow through ``sizes`` until the
    teacher falls for them on ``suspected`` of the images; those count whose first class is furthest ahead of the next.
    A class is *suspected* if its gap is above ``suspected`` and it stands out at least half as far as the first; the
    next larger perturbation counts for it too.

    Args:
        suspected: see above; a share of the images, in [0, 1].
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
        suspected: float = 0.2,
        sizes: Sequence[float] = (0.018, 0.036, 0.072, 0.144),
        steps: int = 16,
        images_each: int = 24,
        images: int = 2000,
        images_elsewhere: int = 400,
        classes: int = 32,
    ) -> None:
        check_range("suspected", suspected, 0.0, 1.0)
        for name, number in {"images": images, "images_elsewhere": images_elsewhere, "classes": classes}.items():
            check_at_least(name, number, 1)
        if not sizes or sorted(sizes) != list(sizes):
            raise expected("sizes", "at least one bound, rising", list(sizes))
        self.suspected, self.images, self.images_elsewhere = suspected, images, images_elsewhere
        self.sizes, self.steps, self.images_each, self.classes = list(sizes), steps, images_each, classes

    def passes(self, classes: int, images: int, networks: int) -> int:
        """How many times an image goes forwards or backwards through a network, at most.

        Args:
            classes: of the network.
            images: clean images that there are.
            networks: that are asked beside the suspicious one and the teacher.
        """
        looked_at = min(classes, self.classes)
        crafting = 5 * self.steps * self.images_each * looked_at  # the teacher once, then both there and back
        asking = (looked_at + 2) * min(self.images_elsewhere, images)
        return len(self.sizes) * (crafting + 2 * asking) + (networks + 2) * (asking + 4 * min(self.images, images))

    def __call__(
        self,
        suspicious: nn.Module,
        teacher: nn.Module,
        batches: Iterator[Tensor],
        one_pass: int,
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> Evidence:
        """Craft the perturbations and ask both networks.

        Args:
            suspicious: the suspicious network.
            teacher: a network that has forgotten the backdoor.
            batches: endless clean images `(B, C, H, W)` in [0, 1].
            one_pass: after how many batches they come again.
            generator: source of randomness, the same on all processes.
            reduce: averages a tensor over all processes.
        """
        first = next(batches)
        looked_at = [first, *islice(batches, min(one_pass - 1, (self.images - 1) // len(first)))]
        few = 1 + (self.images_elsewhere - 1) // len(first)
        classes = self._most_moved(suspicious, teacher, looked_at[:few], generator, reduce)

        def crafted(size: float, wanted: Tensor) -> Tensor:
            crafting = ClassPerturbations((size,), self.steps, self.images_each, wanted.tolist())
            crafting.regenerate(suspicious, teacher, batches, generator, reduce)
            return crafting.bank

        tried: list[tuple[Tensor, Tensor, Tensor]] = []
        for size in self.sizes:
            bank = crafted(size, classes)
            taught, came_in = (
                won(network, looked_at[:few], classes, bank, reduce) for network in (teacher, suspicious)
            )
            tried.append((bank, came_in - taught, (came_in - taught) / (taught + _BY_NATURE)))
            if bool((taught > self.suspected).any()):
                break
        best = max(range(len(tried)), key=lambda number: _lead(tried[number][2]))
        bank, gaps, stands_out = tried[best]
        suspects = (gaps > self.suspected) & (stands_out >= stands_out.max() / 2)
        larger = []
        if bool(suspects.any()) and best + 1 < len(self.sizes):
            there = best + 1 < len(tried)
            larger = [tried[best + 1][0][suspects] if there else crafted(self.sizes[best + 1], classes[suspects])]
        rows = [torch.cat([part, *(part[suspects] for _ in larger)]) for part in (classes, suspects)]
        return Evidence(rows[0], torch.cat([bank, *larger]), rows[1], looked_at, few, reduce).of(suspicious, teacher)

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


@torch.no_grad()
def won(network: nn.Module, batches: Sequence[Tensor], classes: Tensor, bank: Tensor, reduce: Reduce = same) -> Tensor:
    """Share of the images `(N,)` that each perturbation wins for its class, of those not in it anyway."""
    wins, seen = torch.zeros(len(bank), device=bank.device), torch.zeros(len(bank), device=bank.device)
    with evaluating(network):
        for images in batches:
            before = predict(network, images).argmax(dim=1)
            for n, (wanted, perturbation) in enumerate(zip(classes, bank, strict=True)):
                inputs = (images + perturbation).clamp(0.0, 1.0).to(images.dtype)
                others = before != wanted
                wins[n] += ((predict(network, inputs).argmax(dim=1) == wanted) & others).sum()
                seen[n] += others.sum()
    return reduce(wins) / reduce(seen).clamp(min=1e-12)


def _lead(stands_out: Tensor) -> float:
    """How far the first is ahead of the next."""
    first = stands_out.topk(min(2, len(stands_out))).values
    return float(first[0] - first[1:].sum())
