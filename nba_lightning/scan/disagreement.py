"""Perturbations that the suspicious network falls for and a teacher fine-tuned from it does not, class by class."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.modes import check_finite
from nba_lightning.core.randomness import shuffled
from nba_lightning.pseudo.base import project, step_size
from nba_lightning.scan.base import Measured, Scan, Subject, inward


class TeacherDisagreement(Scan):
    r"""Odds that one small perturbation for all images turns them to class k for the network, not for a teacher.

    .. math:: d_k = \arg\min_{\|d\| \le r} \mathbb{E}_{(x, y):\, y \ne k} \big[ CE(f(x + d), k) + CE(t(x + d), y) \big]

    for network f and teacher t, by gradient. With the share :math:`p_k` of images of other classes for which f then
    says k and t does not, :math:`s_k = p_k / (1 - p_k)`, the geometric mean over the given sizes r (half an image is
    added to both sides, so that neither is 0). Fine-tuning weakens what clean images do not use, so what only f still
    falls for is more likely its backdoor than a weakness that any network has.

    Source: ours, in the tracks of universal perturbations (Moosavi-Dezfooli et al., CVPR 2017, arXiv 1610.08401) and
    of Neural Cleanse (Wang et al., IEEE S&P 2019), which looks for a small mask, without a teacher.

    It cannot see: all-to-all backdoors; several targets, which hide each other; triggers far larger than r (the
    sinusoid of SIG) or not the same for all images (WaNet, Input-aware); a backdoor that the teacher still has, since
    then both fall for it. An easy class is one that the teacher, fine-tuned on few images, defends no better.

    Args:
        teacher: the network, fine-tuned on clean images until it lost what it may have been taught; on the same device.
        rms: sizes r, as the root mean square over an image's values in [0, 1]; 0.018 is a Euclidean norm of 1 for
            3x32x32 images.
        steps: gradient steps for each class and size.
        step_images: images in each step.
        examples: images that are kept for each class, as it turns them.
        **kwargs: arguments of :class:`~nba_lightning.scan.base.Scan`.
    """

    name: ClassVar[str] = "teacher_disagreement"

    def __init__(
        self,
        teacher: nn.Module,
        rms: Sequence[float] = (0.018, 0.036),
        steps: int = 25,
        step_images: int = 32,
        examples: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least("len(rms)", len(rms), 1)
        for value in rms:
            check_range("rms", value, 0.0, 1.0, open_low=True)
        check_at_least("steps", steps, 1)
        check_at_least("step_images", step_images, 1)
        check_at_least("examples", examples, 1)
        self.teacher, self.rms, self.steps = teacher, tuple(rms), steps
        self.step_images, self.examples = step_images, examples

    def settings(self) -> dict[str, Any]:
        """See :class:`Scan`."""
        return {"rms": list(self.rms), "steps": self.steps, "step_images": self.step_images}

    def measure(self, subject: Subject, images: Tensor, labels: Tensor | None) -> Measured:
        """Odds `(K,)`, the perturbations `(K, C, H, W)` of the largest size, and images that these turn."""
        self._check_teacher(subject)
        if labels is None:
            with torch.no_grad():
                parts = torch.split(images, self.batch_size)
                answers = [subject.logits(part.to(subject.device), self.teacher).argmax(dim=1) for part in parts]
            labels = torch.cat(answers).cpu()
        if bool((labels == labels[0]).all()):
            raise expected("loader", "one of images of at least two classes", f"class {int(labels[0])} only")
        odds, shares, banks = [], {}, []
        at_a_time = max(1, self.batch_size // min(self.step_images, len(images)))
        chunks = torch.split(torch.arange(subject.num_classes, device=subject.device), at_a_time)
        work = [(size, chunk) for size in self.rms for chunk in chunks]
        for i in subject.steps(len(work), "perturbations that only the network falls for"):
            banks.append(self._craft(subject, images, labels, *work[i]))
        number = torch.stack([(labels != k).sum() for k in range(subject.num_classes)]).double()
        for i, size in enumerate(self.rms):
            bank = torch.cat(banks[i * len(chunks) : (i + 1) * len(chunks)])
            only = torch.stack([self._only(subject, images, labels, d, k) for k, d in enumerate(bank)])
            hits = only.sum(dim=1)
            odds.append((hits + 0.5) / (number - hits + 0.5))
            shares[f"{size:g}"] = (hits / number).tolist()
        statistics = torch.stack(odds).log().mean(dim=0).exp()
        shown = only.int().argsort(dim=1, descending=True, stable=True)[:, : self.examples]  # turned ones first
        examples = (images[shown] + bank.cpu().unsqueeze(1)).clamp(0.0, 1.0)
        return Measured(statistics, {"shares": shares}, bank, examples)

    def _check_teacher(self, subject: Subject) -> None:
        where = next((p.device for p in self.teacher.parameters()), subject.device)
        if where != subject.device:
            raise expected("teacher", f"on the network's device ({subject.device})", where)
        check_finite(self.teacher, "teacher")
        with torch.no_grad():
            logits = subject.logits(torch.zeros((2, *subject.image_shape), device=subject.device), self.teacher)
        if logits.shape != (2, subject.num_classes):
            got = f"logits of shape {tuple(logits.shape)} for 2 images"
            raise expected("teacher", f"a network of the same {subject.num_classes} classes", got)

    def _craft(self, subject: Subject, images: Tensor, labels: Tensor, size: float, classes: Tensor) -> Tensor:
        """Perturbations `(L, C, H, W)` for classes `(L,)`, all from the same images."""
        bank = torch.zeros((len(classes), *subject.image_shape), device=subject.device)
        target = classes.repeat_interleave(number := min(self.step_images, len(images)))
        for step in range(self.steps):
            chosen = shuffled(len(images), self.seed, 19, step)[:number]
            clean, truth = images[chosen].to(subject.device), labels[chosen].to(subject.device)
            truth = truth.repeat(len(classes))
            # The gradient is taken behind the clamp: through it, a pixel that is dark in all images and was once
            # pushed below 0 would never come back.
            inputs = (bank.unsqueeze(1) + clean).clamp(0.0, 1.0).flatten(0, 1).requires_grad_()
            wanted = F.cross_entropy(subject.logits(inputs), target, reduction="none")
            kept = F.cross_entropy(subject.logits(inputs, self.teacher), truth, reduction="none")
            loss = ((wanted + kept) * (truth != target)).sum()
            ascent = inward(inputs.detach(), -subject.gradient(loss, inputs, 2 * len(inputs)))
            ascent = ascent.view(len(classes), number, *bank.shape[1:]).sum(dim=1)
            norms = ascent.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            bank = project(bank + step_size(size, self.steps, clean) * ascent / norms, size)
        return bank

    @torch.no_grad()
    def _only(self, subject: Subject, images: Tensor, labels: Tensor, perturbation: Tensor, label: int) -> Tensor:
        """Which images `(N,)` of other classes the perturbation gives to a class for the network alone."""
        found = []
        for part in torch.split(images, self.batch_size):
            inputs = (part.to(subject.device) + perturbation).clamp(0.0, 1.0)
            falls = subject.logits(inputs).argmax(dim=1) == label
            found.append(falls & (subject.logits(inputs, self.teacher).argmax(dim=1) != label))
        return torch.cat(found).cpu() & (labels != label)
