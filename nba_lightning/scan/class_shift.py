"""The smallest shift of penultimate features that turns images to a class: one forward pass, one small QP a class."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.heads import find_head
from nba_lightning.scan.base import Measured, Scan, Subject


class ClassShift(Scan):
    r"""One over the length of the shortest shift of the last layer's input that turns all images to class k.

    .. math:: d_k = \arg\min_d \|d\|^2 \quad \text{s.t.} \quad (w_k - w_j)^\top (h_i + d) + b_k - b_j \ge 0
        \quad \forall j \ne k,\ \forall i, \qquad s_k = 1 / \|d_k\|

    with weights w and biases b of the last layer and its input h of clean image i. A trigger adds much the same to the
    features of any image; where it was learned, the way to its class is short. Since the constraints of all images
    differ only in their right side, K - 1 remain: :math:`(w_k - w_j)^\top d \ge \max_i (f_j(x_i) - f_k(x_i))`.

    Source: Iwahana et al., "Robust backdoor removal by reconstructing trigger-activated changes in latent
    representation", 2025 (arXiv 2511.08944), of which the abstract and a summary of the optimisation problem were at
    hand, not the text. Theirs are the quadratic program without biases and the idea that the target's shift is
    unusually short. Ours are the biases, the share of images, the solver, and the decision by
    :class:`~nba_lightning.scan.statistics.StudentisedMaximum`; figures need not agree with theirs.

    It cannot see: all-to-all backdoors; several targets, which hide each other; triggers whose change of the features
    differs from image to image, or is no smaller than the way between natural classes. A class in the middle of the
    others is near to all by nature.

    Args:
        share: of the images of other classes, as the network sees them, that must turn, in (0, 1]: those that are
            nearest to the class. 1 hangs on the single hardest image.
        head: module path of the last linear layer; found by itself where its output is the network's.
        **kwargs: arguments of :class:`~nba_lightning.scan.base.Scan`.
    """

    name: ClassVar[str] = "class_shift"

    def __init__(self, share: float = 0.9, head: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("share", share, 0.0, 1.0, open_low=True)
        self.share, self.head = share, head

    def settings(self) -> dict[str, Any]:
        """See :class:`Scan`."""
        return {"share": self.share, "head": self.head}

    @torch.no_grad()
    def measure(self, subject: Subject, images: Tensor, labels: Tensor | None) -> Measured:
        """One over the length of each class's shift `(K,)`; 0 where no shift reaches the class."""
        path = find_head(subject.network, images[:2].to(subject.device, subject.dtype), self.head)
        head = subject.network.get_submodule(path)
        assert isinstance(head, nn.Linear)
        logits = torch.cat([subject.logits(part.to(subject.device)) for part in torch.split(images, self.batch_size)])
        answers = logits.argmax(dim=1)
        if bool((answers == answers[0]).all()):
            got = f"class {int(answers[0])} for all {len(images)} images"
            raise expected("network", "one that gives the images to at least two classes", got)
        weight, logits = head.weight.detach().double(), logits.double()
        needed = torch.stack([needed_change(logits, weight, k, self.share) for k in range(subject.num_classes)])
        lengths, residuals = shortest_shifts(weight, needed)
        if float(residuals.max()) > 1e-2:
            raise RuntimeError(f"A quadratic program was solved to {float(residuals.max()):.1g} only, not to 0.01.")
        return Measured(1 / lengths, {"worst_residual": float(residuals.max())})


def needed_change(logits: Tensor, weight: Tensor, label: int, share: float) -> Tensor:
    r"""How much the logit of a class must gain on each other one `(K,)`: the right sides of its constraints.

    Args:
        logits: `(N, K)` of all images; those of the class itself do not count.
        weight: `(K, D)` of the last layer; says which images are nearest.
        label: the class k.
        share: of the others that must turn.
    """
    gaps = logits[logits.argmax(dim=1) != label]
    gaps = gaps - gaps[:, label : label + 1]
    if share < 1:
        sizes = (weight[label] - weight).norm(dim=1)
        sizes[label] = 1.0
        distances = (gaps / sizes.clamp(min=1e-12)).amax(dim=1)
        number = max(1, round(share * len(gaps)))
        gaps = gaps[distances.topk(number, largest=False).indices]
    return gaps.amax(dim=0)


def shortest_shifts(weight: Tensor, needed: Tensor, steps: int = 20_000) -> tuple[Tensor, Tensor]:
    r"""Lengths of the shortest d with :math:`(w_k - w_j)^\top d \ge c_{kj}` for all j, for each k at once.

    Least distance programming (Lawson & Hanson, "Solving least squares problems", 1974, chapter 23): with
    :math:`A` of rows :math:`w_k - w_j`, the u >= 0 that minimises :math:`\|A^\top u\|^2 + (c^\top u - 1)^2` gives
    :math:`d = A^\top u / (1 - c^\top u)`; where the minimum is 0, no d exists. Solved by accelerated projected
    gradients, restarted where they overshoot, all classes side by side.

    Args:
        weight: `(K, D)` float64.
        needed: `(K, K)` c, row k for class k; the diagonal does not count.
        steps: at most.

    Returns:
        Lengths `(K,)`, infinite where no shift reaches the class (or only one 1,000 times as long as any single
        constraint asks); and how far each is from its conditions of optimality `(K,)`, relative to its length: the
        largest violation of a constraint, or the gap to the dual.
    """
    programs = _Programs(weight, needed)
    rate = 1 / programs.curvature()
    dual = ahead = torch.zeros_like(needed)
    momentum = torch.ones_like(rate)
    for step in range(steps):
        moved = (ahead - rate * programs.slope(ahead)).clamp(min=0.0) * programs.others
        overshot = ((ahead - moved) * (moved - dual)).sum(dim=1, keepdim=True) > 0
        momentum = momentum.masked_fill(overshot, 1.0)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = moved + (momentum - 1) / following * (moved - dual)
        dual, momentum = moved, following
        if step % 50 == 49 and bool((programs.solution(dual)[1] < 1e-6).all()):
            break
    return programs.solution(dual)


class _Programs:
    """The K least squares problems, with rows of length 1 and right sides whose largest is 1."""

    def __init__(self, weight: Tensor, needed: Tensor) -> None:
        self.weight, self.others = weight, torch.ones_like(needed).fill_diagonal_(0)
        distances: Tensor = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
        self.sizes = distances.clamp(min=1e-12)
        # The lengths that single constraints ask for bound the shift from below: the unit in which all is measured.
        self.right = needed / self.sizes * self.others
        self.unit = self.right.amax(dim=1, keepdim=True).clamp(min=1e-12)
        self.right = self.right / self.unit

    def shift(self, dual: Tensor) -> Tensor:
        """Transposed rows times ``dual`` `(K, K)`: `(K, D)`."""
        dual = dual * self.others / self.sizes
        return dual.sum(dim=1, keepdim=True) * self.weight - dual @ self.weight

    def gains(self, shifts: Tensor) -> Tensor:
        """Rows times ``shifts`` `(K, D)`: `(K, K)`."""
        own = (shifts * self.weight).sum(dim=1, keepdim=True)
        return (own - shifts @ self.weight.T) / self.sizes * self.others

    def slope(self, dual: Tensor) -> Tensor:
        """Half the gradient of the least squares `(K, K)`."""
        left = (self.right * dual).sum(dim=1, keepdim=True) - 1
        return self.gains(self.shift(dual)) + left * self.right

    def curvature(self) -> Tensor:
        """The largest eigenvalue of each problem `(K, 1)`, by power iteration, and a tenth for safety."""
        vector = self.others
        for _ in range(100):
            vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-12)
            vector = self.gains(self.shift(vector)) + (self.right * vector).sum(dim=1, keepdim=True) * self.right
        largest: Tensor = vector.norm(dim=1, keepdim=True)
        return 1.1 * largest.clamp(min=1e-12)

    def solution(self, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths and residuals `(K,)`; see :func:`shortest_shifts`."""
        left = 1 - (self.right * dual).sum(dim=1)
        shifts = self.shift(dual)
        reached = shifts.square().sum(dim=1) + left.square() > 1e-6
        scale = left.clamp(min=1e-12)
        shifts, dual = shifts / scale.unsqueeze(1), dual / scale.unsqueeze(1)
        lengths = shifts.norm(dim=1).clamp(min=1e-12)
        violated = (self.right - self.gains(shifts)).mul(self.others).amax(dim=1) / lengths
        gap = (lengths.square() - (self.right * dual).sum(dim=1)).abs() / lengths.square()
        there = self.unit.squeeze(1) <= 1e-12  # nothing to gain: a shift of length 0 will do
        residuals = violated.maximum(gap).masked_fill(~reached | there, 0.0)
        return (lengths * self.unit.squeeze(1)).masked_fill(~reached, torch.inf), residuals
