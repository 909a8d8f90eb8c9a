"""Unlearning what only the suspicious network falls for."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nba_lightning.callbacks.given import unless_given
from nba_lightning.callbacks.pseudo_samples import PseudoSampleRegeneration
from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.functional import kl_divergence
from nba_lightning.core.modes import Frozen, fingerprint
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.batches import clean_batches, plain_images
from nba_lightning.pseudo import ClassPatches, ClassPerturbations, Together
from nba_lightning.training.cost import number_of_classes, passes_of_paced_crafting
from nba_lightning.training.distillation import Distillation
from nba_lightning.training.reached import STILL_REACHED, passes_of_reached, still_reached
from nba_lightning.training.schedule import batches_of_an_epoch, epochs_of_crafted
from nba_lightning.training.search import Search
from nba_lightning.training.sweep import UNLEARNING_RATE
from nba_lightning.training.ways import set_at

_CLASSES = 5
"""Of more classes each has fewer images in crafting, which so costs about as much, and comes half as often."""


class Unlearning(Distillation):
    r"""Unlearn what the suspicious network falls for and its teacher withstands.

    What verification kept (:class:`~nba_lightning.training.verification.Verification`) still falls a little for what
    reaches a suspected class, and where none is suspected for what nothing showed. From there on the student K
    minimises

    .. math:: KL(S_0(x) \| K(z))

    where S_0 is the suspicious network, x are clean images as the loader augments them, and z the same images, a share
    of them as pseudo samples: small perturbations and patches for some classes, crafted anew every few steps so that K
    falls for them and the teacher T withstands. So K keeps S_0's answers whatever is on the image. When the fit ends,
    the network goes back to ``kept`` of the way from where it started to where it came, by weights and BatchNorm
    statistics: half of the way forgets nearly as much, and loses less accuracy.

    What T has kept of the backdoor nothing shows that T withstands. So before the fit suspected classes are looked at
    without T (:func:`~nba_lightning.training.reached.still_reached`): if K is led to one as the suspicious network is,
    T is no guide, only K must fall for what is crafted, and K keeps all of the way. It comes after NBA:

        nba = NBA(copy.deepcopy(network), teacher=teacher)  # after its fit
        Unlearning(network, teacher=teacher, start=nba, classes=nba.verification.to_unlearn)

    What it trains on is of the kind that verification measures with, so nothing measures afterwards what it left of a
    trigger of another kind. Therefore it starts from what passed without it, never from further back.

    Source: ours. Universal perturbations are crafted and unlearned in turn by I-BAU (Zeng et al., ICLR 2022), towards
    any class, with labels, and without a teacher that must withstand them.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        teacher: the teacher, of the same architecture: a network, or the defence that made it.
        teacher_weights: a file with the teacher's weights, instead of ``teacher``.
        start: what verification kept: a network, or the defence that made it; ``None`` for the teacher.
        start_weights: a file with its weights, instead of ``start``.
        classes: whose ways in are unlearned; ``None`` looks for suspected ones, which costs as much as a verification,
            and takes all that were looked at if there are none.
        perturbations: how small perturbations are crafted; its ``classes`` are set here, and with more than five of
            them fewer images for each.
        patches: how patches are crafted, likewise.
        pseudo_share: share of each batch that are pseudo samples, as many of each kind.
        kept: share of the way that the network keeps, in (0, 1], where nothing shows that the teacher has kept the
            backdoor.
        search: how suspected classes are looked for.
        lr: initial learning rate; ``None`` fits the network: SGD at 0.005, or AdamW at 0.0001 for one with layer
            or group normalisation or depthwise convolutions.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Attributes:
        classes: those whose ways in are unlearned; ``None`` before they are known.
        reached: how easily suspected ones are reached from where it starts, in units of the suspicious network's; 0
            before that is known, and where all classes are taken, which tells nothing.
        left: the same of what it came to; where it was less than half before, it is not looked for again.

    Raises:
        ValueError: for a share outside (0, 1], ``start`` and ``start_weights`` both, weights that do not fit; at the
            start of a fit for a class that the network has not got, or a ``start`` with the suspicious weights.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        teacher: nn.Module | None = None,
        teacher_weights: str | None = None,
        start: nn.Module | None = None,
        start_weights: str | None = None,
        classes: Sequence[int] | None = None,
        perturbations: ClassPerturbations | None = None,
        patches: ClassPatches | None = None,
        pseudo_share: float = 2 / 3,
        kept: float = 0.5,
        search: Search | None = None,
        lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        rate = UNLEARNING_RATE["SGD"] if lr is None else lr
        super().__init__(model, weights, teacher, teacher_weights, lr=rate, **kwargs)
        if lr is None:
            self.fit_to_network(UNLEARNING_RATE)
        check_range("pseudo_share", pseudo_share, 0.0, 1.0, open_low=True)
        check_range("kept", kept, 0.0, 1.0, open_low=True)
        if classes is not None and not len(classes):
            raise expected("classes", "at least one class, or None to look for them", list(classes))
        perturbations = perturbations or ClassPerturbations((0.018, 0.036, 0.072), steps=8, images_each=24)
        self.crafted = (perturbations, patches or ClassPatches(steps=8))
        self._images_each = [source.images_each for source in self.crafted]
        self.pseudo, self.pseudo_share = Together(self.crafted), pseudo_share
        self.kept, self.search = kept, search or Search()
        self.classes = None if classes is None else sorted(classes)
        self.suspicious = Frozen(model)
        self.start = self._given("start", start, start_weights)
        self.reached, self.left, self._looked, self._ended = 0.0, 0.0, False, False

    def setup(self, stage: str) -> None:
        """As usual; a fit begins with the weights of what verification kept."""
        super().setup(stage)
        if stage == "fit":
            self.reached, self.left = 0.0, 0.0
            self._looked, self._ended, start = False, False, self._begin()
            if fingerprint(start) == fingerprint(self.suspicious.network):
                raise expected(
                    "start",
                    "another network than the suspicious one (NBA trains what it is given: give it `copy.deepcopy`)",
                    "one with the same weights",
                )
            self._begin_with("start", "the suspicious network's", start)

    @property
    def guided(self) -> bool:
        """Whether the teacher must withstand what is crafted: not where it has kept the backdoor."""
        return self.reached < STILL_REACHED

    def configure_callbacks(self) -> list[Callback]:
        """Craft the pseudo samples anew."""
        return [*super().configure_callbacks(), *unless_given(self._trainer, PseudoSampleRegeneration())]

    def least_epochs_of_pseudo_samples(self) -> int:
        """As many as there are steps in which pseudo samples serve at least."""
        return epochs_of_crafted(self.trainer, 1 + (len(self._classes_at_most()) > _CLASSES))

    def passes_of_step(self) -> float:
        """See :meth:`Classifier.passes_of_step`: there and back, and once through the suspicious network."""
        return 3

    def passes_beside(self, epochs: int, images: int, batch: int) -> dict[str, int]:
        """See :meth:`Classifier.passes_beside`."""
        processes, number = self.trainer.world_size, number_of_classes(self)
        self._craft_for(most := self._classes_at_most())
        passes = self.pseudo.passes(batch // processes, len(most))
        found = {"crafting": passes_of_paced_crafting(self, epochs, passes)}
        if self.classes is None:
            found["the search"] = processes * self.search.passes(number, images // processes, 0)
        if self.classes is None or self._suspects():
            found["what is still reached"] = 2 * processes * passes_of_reached(number, len(most))
        return found

    def regenerate(self) -> None:
        """Craft perturbations and patches that the student, as it is now, falls for and the teacher withstands."""
        generator = generator_for(self.seed, 20, self.trainer.current_epoch, device=self.device)
        with self.trainer.precision_plugin.forward_context():
            if self.classes is None:
                self.classes = self._look()
            if not self._looked:
                self._looked, self.reached = True, self._still_reached()
            self._craft_for(self.classes)
            for source in self.crafted:
                source.bank = torch.empty(0)  # what was unlearned leads nowhere new
            batches = (batch.images for batch in clean_batches(self.trainer))
            self.pseudo.regenerate(self.model, self.teacher_network(), batches, generator, self.reduce)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The divergence from the suspicious network's answers to the images without pseudo samples."""
        images, _ = self.unpack(batch, batch_idx)
        generator = generator_for(
            self.seed, 21, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        with torch.no_grad():
            known = predict(self.suspicious.network, images)
            inputs = self.pseudo.put_on(images, self.pseudo_share, self.model, self.teacher_network(), generator)
        loss = kl_divergence(known, predict(self.model, inputs)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As usual; and go back with the last step, before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        if self.was_last_step():
            self._go_back()

    def on_train_end(self) -> None:
        """A fit that ended early goes back too."""
        self._go_back()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and what was found."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"classes": self.classes, "ended": self._ended}
        if self._looked:
            checkpoint |= {"reached": self.reached, "left": self.left}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and take them over."""
        super().on_load_checkpoint(checkpoint)
        self.classes, self._ended = checkpoint.get("classes", self.classes), checkpoint.get("ended", False)
        self._looked = "reached" in checkpoint
        self.reached, self.left = checkpoint.get("reached", 0.0), checkpoint.get("left", 0.0)

    def _begin(self) -> nn.Module:
        """Where a fit starts."""
        return self.teacher_network() if self.start is None else self.start.network

    def _go_back(self) -> None:
        """Keep a share of the way, or all, and look at it; once."""
        if self._ended:
            return
        self._ended, self.left = True, self.reached
        if not self.guided:
            with self.trainer.precision_plugin.forward_context():
                self.left = self._still_reached()
        else:
            begin, came = self._begin().state_dict(), self.model.state_dict()
            set_at(self.model, (self.kept, 0.0), begin, {name: value.clone() for name, value in came.items()}, begin)

    def _suspects(self) -> list[int]:
        """The classes if they are suspected ones; none where they are all that would be looked at, or not known."""
        classes = self.classes or []
        return classes if len(classes) < min(number_of_classes(self), self.search.classes) else []

    def _still_reached(self) -> float:
        """How easily suspected classes are reached from the student as it is."""
        if not (suspects := self._suspects()):
            return 0.0
        generator = generator_for(self.seed, 22, device=self.device)
        images = plain_images(self.trainer)
        return still_reached(self.model, self.suspicious.network, suspects, images, generator, self.reduce)

    def _classes_at_most(self) -> Sequence[int]:
        """The classes, or as many as there may be before they are known."""
        return range(min(number_of_classes(self), self.search.classes)) if self.classes is None else self.classes

    def _craft_for(self, classes: Sequence[int]) -> None:
        """Let pseudo samples be for some classes, which share the images of crafting if they are many."""
        share = min(1.0, _CLASSES / len(classes))
        for source, images in zip(self.crafted, self._images_each, strict=True):
            source.classes, source.guided = list(classes), self.guided
            source.images_each = max(1, round(share * images))

    def _look(self) -> list[int]:
        """The classes that the suspicious network alone is led to unusually easily, or all that were looked at."""
        rank_zero_info("Looking for what only the suspicious network falls for.")
        found = self.search(
            self.suspicious.network,
            self.teacher_network(),
            plain_images(self.trainer),
            batches_of_an_epoch(self.trainer),
            generator_for(self.seed, 8, device=self.device),
            self.reduce,
        )
        if found.suspected:
            rank_zero_info(f"Suspected: class {', '.join(map(str, found.suspected))}.")
        else:
            rank_zero_info(f"No class stands out, so all {len(found.looked_at)} that were looked at are taken.")
        return found.suspected or found.looked_at
