"""MM-BD: the largest margin that any input reaches, class by class, without images."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.randomness import generator_for
from nba_lightning.scan.base import Measured, Scan, Subject, inward


class MaximumMargin(Scan):
    r"""For each class the largest margin of its logit over all others, among all inputs in [0, 1].

    .. math:: s_k = \max_{x \in [0, 1]^{C \times H \times W}} \Big( f_k(x) - \max_{j \ne k} f_j(x) \Big)

    by gradient ascent from random images. A backdoor teaches the network that a few features outweigh all others, so
    the margin of its target grows beyond what natural features reach.

    Source: Wang et al., "MM-BD: post-training detection of backdoor attacks with arbitrary backdoor pattern types
    using a maximum margin statistic", IEEE S&P 2024 (arXiv 2205.06900); code wanghangpsu/MM-BD, 30 starts,
    300 steps of SGD at 0.01. Deviations: steps are normalised for each image, with a rate that falls to 0, and the
    image is projected, so that the result does not hang on the scale of the logits (in the authors' code a network
    with logits ten times smaller moves ten times less, and the momentum has no effect, since the optimiser is made
    anew at each step); the largest margin of all steps counts, not that of the last; the decision is
    :class:`~nba_lightning.scan.statistics.StudentisedMaximum`, not the gamma null.

    It cannot see: all-to-all backdoors; several targets, which hide each other; backdoors of a network that was
    trained to bound its margins (by label smoothing, logit clipping, an adaptive attacker). Classes that are easy by
    nature have large margins too.

    Args:
        starts: random images for each class, all at a time.
        steps: gradient steps.
        rms: length of the first step, as the root mean square over an image's values.
        **kwargs: arguments of :class:`~nba_lightning.scan.base.Scan`.
    """

    name: ClassVar[str] = "maximum_margin"
    needs_images: ClassVar[bool] = False

    def __init__(self, starts: int = 30, steps: int = 100, rms: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("starts", starts, 1)
        check_at_least("steps", steps, 1)
        check_range("rms", rms, 0.0, 1.0, open_low=True)
        self.starts, self.steps, self.rms = starts, steps, rms

    def settings(self) -> dict[str, Any]:
        """See :class:`Scan`."""
        return {"starts": self.starts, "steps": self.steps, "rms": self.rms}

    def measure(self, subject: Subject, images: Tensor, labels: Tensor | None) -> Measured:
        """The largest margin `(K,)` and the inputs `(K, C, H, W)` that reach it."""
        generator = generator_for(self.seed, 13)
        parts = torch.split(torch.arange(subject.num_classes), max(1, self.batch_size // self.starts))
        best, reached = [], []
        for i in subject.steps(len(parts), "largest margins"):
            inputs = torch.rand((len(parts[i]) * self.starts, *subject.image_shape), generator=generator)
            classes = parts[i].repeat_interleave(self.starts)
            margins, found = self._climb(subject, classes.to(subject.device), inputs.to(subject.device))
            statistics, chosen = margins.view(len(parts[i]), self.starts).max(dim=1)
            best.append(statistics)
            reached.append(found.view(len(parts[i]), self.starts, *subject.image_shape)[range(len(chosen)), chosen])
        return Measured(torch.cat(best), pictures=torch.cat(reached))

    def _climb(self, subject: Subject, classes: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The largest margins `(B,)` on the way up from ``inputs`` `(B, C, H, W)`, and where they were."""
        best = torch.full((len(classes),), -math.inf, device=inputs.device)
        reached = inputs
        length = self.rms * math.sqrt(inputs[0].numel())
        for step in range(self.steps + 1):
            leaf = inputs.detach().requires_grad_()
            margins = margin(subject.logits(leaf), classes)
            better = margins.detach() > best
            best = torch.where(better, margins.detach(), best)
            reached = torch.where(better.view(-1, 1, 1, 1), leaf.detach(), reached)
            if step < self.steps:
                gradients = inward(leaf.detach(), subject.gradient(margins.sum(), leaf, len(leaf)))
                norms = gradients.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
                rate = length * (1 - step / self.steps)
                inputs = (leaf.detach() + rate * gradients / norms).clamp(0.0, 1.0)
        return best, reached


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """Logit of each one's class over the largest other `(B,)`, for logits `(B, K)` and classes `(B,)`."""
    own = torch.nn.functional.one_hot(classes, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -math.inf).amax(dim=1)
