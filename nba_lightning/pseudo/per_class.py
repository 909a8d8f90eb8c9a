"""Pseudo samples that are crafted for each class: the student falls for the class, the teacher withstands."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, expected
from nba_lightning.core.features import predict
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Banked, KLDisagreement, Reduce, repeated, same

AT_ONCE = 64
"""Images that go through the networks at once, about; all at once they would need more memory than training does."""


class PerClass(Banked):
    r"""Base class of what is crafted universally for each class k, by gradient.

    With z the clean images x as they are shown with it, it minimises

    .. math:: CE(S(z), k) + CE(T(z), T(x))

    so that S falls for the class, and T goes on saying what it says of x. Where T is no guide, since it falls for the
    same, ``guided`` is set to False, and the first term is all.

    Args:
        rms: see :class:`PseudoSamples`.
        steps: gradient steps at each regeneration, one batch each.
        images_each: clean images for each row of the bank in a step.
        classes: the classes k; all by default.

    Attributes:
        guided: whether T must withstand; True at first.

    Raises:
        ValueError: for no class; by :meth:`regenerate` for one that the network has not got.
    """

    def __init__(self, rms: float, steps: int, images_each: int, classes: Sequence[int] | None) -> None:
        super().__init__(rms, steps, KLDisagreement())
        check_at_least("images_each", images_each, 1)
        if classes is not None and not len(classes):
            raise expected("classes", "at least one class, or None for all", list(classes))
        self.images_each, self.classes, self.guided = images_each, classes, True

    @abstractmethod
    def rows_of(self, classes: Tensor) -> Tensor:
        """The class of each row `(N,)` of the bank, for the classes that are looked at."""

    @abstractmethod
    def show(self, images: Tensor, contents: Tensor, rows: Tensor) -> Tensor:
        """Clean images `(B, C, H, W)` with the contents `(B, C, H, W)` of the rows `(B,)` of the bank."""

    @abstractmethod
    def _begin(self, images: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
        """A bank to start from."""

    @abstractmethod
    def _moved(self, bank: Tensor, gradients: Tensor, step: int) -> Tensor:
        """The bank after one step against the gradients `(N, C, H, W)`."""

    def regenerate(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Iterable[Tensor],
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> None:
        """Some gradient steps on the bank; see :meth:`PseudoSamples.regenerate`."""
        endless = batches if isinstance(batches, Iterator) else repeated(batches)
        images = next(endless)
        with evaluating(student, teacher):
            with torch.no_grad():
                number = predict(student, images[:1]).shape[1]
            looked_at = range(number) if self.classes is None else self.classes
            if min(looked_at) < 0 or max(looked_at) >= number:
                raise expected("classes", f"from 0 to {number - 1}, the network's", list(looked_at))
            wanted = self.rows_of(torch.tensor(looked_at, device=images.device))
            if self.bank.numel() == 0:
                self.bank = self._begin(images, len(wanted), generator)
            bank = self.bank.to(images.device)
            for step in range(self.steps):
                images = images if step == 0 else next(endless)
                size = (len(wanted) * self.images_each,)
                chosen = torch.randint(len(images), size, generator=generator, device=images.device)
                gradients = reduce(self._towards(student, teacher, images, chosen, bank, wanted))
                bank = self._moved(bank, gradients, step)
        self.bank = bank

    def passes(self, batch: int, num_classes: int) -> int:
        """See :meth:`PseudoSamples.passes`."""
        rows = len(self.rows_of(torch.arange(num_classes if self.classes is None else len(self.classes))))
        return (5 if self.guided else 2) * self.steps * rows * self.images_each + 1

    def _towards(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, chosen: Tensor, bank: Tensor, wanted: Tensor
    ) -> Tensor:
        """Gradients of what is minimised, `(N, C, H, W)`; ``chosen`` names ``images_each`` images of each in turn."""
        some = max(1, AT_ONCE // self.images_each)
        own = torch.split(chosen, some * self.images_each)
        rows = torch.split(torch.arange(len(bank), device=images.device), some)
        return torch.cat(
            [
                self._towards_rows(student, teacher, images[seen], bank, wanted, part)
                for part, seen in zip(rows, own, strict=True)
            ]
        )

    def _towards_rows(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, bank: Tensor, wanted: Tensor, rows: Tensor
    ) -> Tensor:
        owner = rows.repeat_interleave(self.images_each)
        with torch.enable_grad():
            leaf = bank[rows].detach().requires_grad_()
            inputs = self.show(images, leaf.repeat_interleave(self.images_each, dim=0), owner)
            loss = F.cross_entropy(predict(student, inputs).float(), wanted[owner], reduction="sum")
            if self.guided:
                with torch.no_grad():
                    said = predict(teacher, images).argmax(dim=1)
                loss = loss + F.cross_entropy(predict(teacher, inputs).float(), said, reduction="sum")
            return torch.autograd.grad(GRADIENT_SCALE * loss, leaf)[0].float()

    def forward(
        self,
        images: Tensor,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What one row of the bank, drawn at random for each image, changes in it."""
        rows = self.drawn(images, generator)
        return self.show(images, self.bank.to(images)[rows], rows) - images
