"""Whether a student that learned from the suspicious network has learned its backdoor too."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating, reestimate_statistics
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.pseudo.class_perturbations import ClassPerturbations


class Verification:
    r"""Keep as much of what a student learned as shows no sign of the backdoor, without knowing a trigger.

    For each class k a small universal perturbation :math:`d_k` is crafted that the suspicious network falls for and the
    teacher withstands. A backdoor makes the target class easy to reach, and a student that has learned it falls for
    :math:`d_k` too. A class is *suspected* if :math:`d_k` wins it ``suspected`` more of the images from the suspicious
    network than from the teacher; perturbations grow through ``sizes`` until a class is, or until the teacher falls for
    them on ``suspected`` of the images itself. Of the networks :math:`T + r (S - T)` on the way from the teacher T to
    the student S, r from ``shares``, the first is kept from which no suspected class wins more than ``margin`` more
    images than from the teacher, and no other class more than ``margin_elsewhere``; r is 0, and the student the
    teacher, if none does.
    BatchNorm statistics of what lies between are estimated anew.

    Ours; the thresholds were found on two models. Weights between two networks that were fine-tuned from one another
    are as in Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022 (arXiv 2109.01903), section 3. What
    it cannot see: a backdoor whose trigger no small perturbation of the image resembles.

    Args:
        shares: r, from the largest to the smallest.
        suspected: see above; a share of the images, in [0, 1].
        margin: likewise.
        margin_elsewhere: likewise.
        sizes: bounds on the root mean square of a perturbation, in units of the image range [0, 1], rising.
        steps: gradient steps of crafting, one batch each.
        images_each: clean images for each perturbation in a step.
        images: clean images of each process on which falling is measured, if there are so many.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        shares: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
        suspected: float = 0.2,
        margin: float = 0.02,
        margin_elsewhere: float = 0.1,
        sizes: Sequence[float] = (0.018, 0.036, 0.072, 0.144),
        steps: int = 12,
        images_each: int = 16,
        images: int = 400,
    ) -> None:
        for share in shares:
            check_range("shares", share, 0.0, 1.0, open_low=True)
        if sorted(shares, reverse=True) != list(shares):
            raise expected("shares", "from the largest to the smallest", list(shares))
        for name, value in {"suspected": suspected, "margin": margin, "margin_elsewhere": margin_elsewhere}.items():
            check_range(name, value, 0.0, 1.0)
        check_at_least("images", images, 1)
        self.shares, self.images = list(shares), images
        self.suspected, self.margin, self.margin_elsewhere = suspected, margin, margin_elsewhere
        if not sizes or sorted(sizes) != list(sizes):
            raise expected("sizes", "at least one bound, rising", list(sizes))
        self.sizes, self.steps, self.images_each = list(sizes), steps, images_each
        self.rates: dict[str, list[float]] = {}

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
        first = next(batches)
        looked_at = [first, *islice(batches, min(one_pass - 1, (self.images - 1) // len(first)))]
        learned = {name: value.clone() for name, value in student.state_dict().items()}
        for size in self.sizes:
            crafting = ClassPerturbations((size,), self.steps, self.images_each)
            crafting.regenerate(suspicious, teacher, batches, generator, reduce)
            bank = crafting.bank
            taught, came_in = (self._rates(network, looked_at, bank, reduce) for network in (teacher, suspicious))
            suspects = came_in - taught > self.suspected
            if bool(suspects.any()) or bool((taught > self.suspected).any()):
                break
        allowed = taught + torch.where(suspects, self.margin, self.margin_elsewhere)
        self.rates = {"teacher": taught.tolist(), "suspicious": came_in.tolist()}
        for share in (*self.shares, 0.0):
            _set_between(student, teacher.state_dict(), learned, share)
            if 0 < share < 1:
                reestimate_statistics(student, looked_at)
            rates = self._rates(student, looked_at, bank, reduce)
            self.rates[f"{share:g}"] = rates.tolist()
            if share == 0 or bool((rates <= allowed).all()):
                break
        rank_zero_info(_sentence(share, self.rates))
        return share

    @torch.no_grad()
    def _rates(self, network: nn.Module, batches: Sequence[Tensor], bank: Tensor, reduce: Reduce) -> Tensor:
        """Share of the images `(K,)` that each class's perturbation wins for its class, of those not in it anyway."""
        won, seen = torch.zeros(len(bank), device=bank.device), torch.zeros(len(bank), device=bank.device)
        with evaluating(network):
            for images in batches:
                before = predict(network, images).argmax(dim=1)
                for k, perturbation in enumerate(bank):
                    others = images[before != k]
                    if len(others):
                        inputs = (others + perturbation).clamp(0.0, 1.0).to(images.dtype)
                        won[k] += (predict(network, inputs).argmax(dim=1) == k).sum()
                        seen[k] += len(others)
        return reduce(won) / reduce(seen).clamp(min=1e-12)


@torch.no_grad()
def _set_between(network: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> None:
    """Weights of ``network``: ``start`` + share * (``end`` - ``start``)."""
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(start[name].to(value.device).float(), end[name].float(), share))
        else:
            value.copy_(end[name] if share else start[name])
    torch.clear_autocast_cache()  # else what follows would run on half-precision copies of the weights before


def _sentence(share: float, rates: dict[str, list[float]]) -> str:
    worst = max(range(len(rates["suspicious"])), key=lambda k: rates["suspicious"][k] - rates["teacher"][k])
    told = (
        f"small perturbations win class {worst} {100 * rates['suspicious'][worst]:.0f} % of the images from the "
        f"suspicious network, {100 * rates['teacher'][worst]:.0f} % from the teacher and "
        f"{100 * rates[f'{share:g}'][worst]:.0f} % from the network that is kept."
    )
    kept = "all" if share == 1 else "nothing" if share == 0 else f"{100 * share:.0f} %"
    return f"Verified: {kept} of what the student learned from the suspicious network is kept; {told}"
