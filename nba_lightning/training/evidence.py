"""Evidence of a backdoor: what a suspicious network falls for and its teacher withstands, and who falls for it too."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress

import torch
from torch import Tensor, nn

from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.pseudo.class_patches import covered


@dataclass
class Evidence:
    """N perturbations and patches, and the images on which networks are asked.

    Attributes:
        classes: `(N,)` the class that each is for; a suspected one has several.
        bank: `(N, C, H, W)` what is added to the images.
        suspects: `(N,)` whether the class is suspected by what is of its kind, perturbations or patches.
        images: batches of clean images.
        few: how many of these batches are enough for a class that is not suspected.
        reduce: averages a tensor over all processes.
        covers: `(N, 1, H, W)` 1 where a patch covers the image; `None` where there are no patches.
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
    covers: Tensor | None = None
    said: list[Tensor] = field(default_factory=list)
    taught: Tensor = field(default_factory=lambda: torch.empty(0))
    gaps: Tensor = field(default_factory=lambda: torch.empty(0))
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def patches(self) -> Tensor:
        """Which are patches `(N,)`."""
        if self.covers is None:
            return torch.zeros_like(self.suspects)
        return self.covers.flatten(1).any(dim=1)

    @property
    def suspected(self) -> list[int]:
        """The classes that are suspected, rising."""
        return sorted(set(self.classes[self.suspects].tolist()))

    @property
    def looked_at(self) -> list[int]:
        """The classes that were looked at, rising."""
        return sorted(set(self.classes.tolist()))

    def only(self, rows: Tensor) -> "Evidence":
        """Those rows `(N,)` alone, with what networks said to them."""
        kept = {name: getattr(self, name)[rows] for name in ("classes", "bank", "suspects", "taught", "gaps")}
        covers = None if self.covers is None else self.covers[rows]
        rates = {name: list(compress(shares, rows.tolist())) for name, shares in self.rates.items()}
        return replace(self, covers=covers, rates=rates, **kept)

    def of(self, suspicious: nn.Module, teacher: nn.Module) -> "Evidence":
        """Ask the suspicious network and the teacher."""
        with torch.no_grad(), evaluating(suspicious):
            self.said = [predict(suspicious, images).argmax(dim=1) for images in self.images]
        self.taught = self.won(teacher, "teacher")
        self.gaps = (self.won(suspicious, "suspicious") - self.taught).clamp(min=1e-6)
        return self

    def won(self, network: nn.Module, name: str) -> Tensor:
        """Share of the images `(N,)` that each row of the bank wins from a network; of suspects on all images."""
        rates = torch.zeros(len(self.bank), device=self.bank.device, dtype=torch.float32)
        for rows, images in ((self.suspects, self.images), (~self.suspects, self.images[: self.few])):
            if bool(rows.any()):
                covers = None if self.covers is None else self.covers[rows]
                rates[rows] = won(network, images, self.classes[rows], self.bank[rows], self.reduce, covers)
        self.rates[name] = rates.tolist()
        return rates

    def came_back(self, network: nn.Module, name: str) -> tuple[float, float]:
        """How much of what the suspicious network falls for a network falls for.

        Returns:
            The largest share of a suspected class's gap, the mean over its perturbations or over its patches; and of
            the other classes the largest share of the images beyond the teacher's and beyond half of the gap.
        """
        more = self.won(network, name) - self.taught
        ratio, suspects, patches = more / self.gaps, self.suspects, self.patches
        kinds = sorted(set(zip(self.classes[suspects].tolist(), patches[suspects].tolist(), strict=True)))
        back = [float(ratio[suspects & (self.classes == number) & (patches == kind)].mean()) for number, kind in kinds]
        others = (more - self.gaps / 2)[~suspects]
        elsewhere = torch.where(others > 0, more[~suspects], 0.0)
        return max(back, default=0.0), float(elsewhere.max()) if len(elsewhere) else 0.0

    @torch.no_grad()
    def agreement(self, network: nn.Module) -> float:
        """Share of the clean images to which a network says what the suspicious one says."""
        with evaluating(network):
            agrees = [predict(network, x).argmax(dim=1) == y for x, y in zip(self.images, self.said, strict=True)]
        return float(self.reduce(torch.cat(agrees).float().mean()))


@torch.no_grad()
def won(
    network: nn.Module,
    batches: Sequence[Tensor],
    classes: Tensor,
    bank: Tensor,
    reduce: Reduce = same,
    covers: Tensor | None = None,
) -> Tensor:
    """Share of the images `(N,)` that each row of a bank wins for its class, of those not in it anyway."""
    wins, seen = torch.zeros((2, len(bank)), device=bank.device, dtype=torch.float32)
    with evaluating(network):
        for images in batches:
            before = predict(network, images).argmax(dim=1)
            for n, (wanted, contents) in enumerate(zip(classes, bank, strict=True)):
                inputs = covered(images, contents, contents.new_zeros(1) if covers is None else covers[n])
                others = before != wanted
                wins[n] += ((predict(network, inputs).argmax(dim=1) == wanted) & others).sum()
                seen[n] += others.sum()
    return reduce(wins) / reduce(seen).clamp(min=1e-12)
