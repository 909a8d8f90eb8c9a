"""Neural Behavioral Alignment."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from nba_lightning.behaviors.base import Behavior, alignment_loss
from nba_lightning.behaviors.gram import ChannelGram
from nba_lightning.callbacks.given import unless_given
from nba_lightning.callbacks.pseudo_samples import PseudoSampleRegeneration
from nba_lightning.core.augmentation import CutMix, RandomCropFlip
from nba_lightning.core.checks import check_at_least, check_choice, check_range, expected
from nba_lightning.core.features import features, resolve_layers
from nba_lightning.core.functional import kl_divergence
from nba_lightning.core.modes import Frozen
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.batches import clean_batches
from nba_lightning.pseudo import PseudoSamples, UniversalPerturbations
from nba_lightning.training.distillation import Distillation

AlignWith = Literal["suspicious", "teacher"]


@dataclass
class Weights:
    """Weights of the terms in one part of the fit; a term whose weight is 0 is not computed.

    Args:
        cross_entropy: weight mu of the cross-entropy with the labels.
        distillation: weight beta of the divergence from the answers on the unperturbed images.
        alignment: weight lambda of the alignment of behaviours.

    Raises:
        ValueError: for a negative weight, or none that is positive.
    """

    cross_entropy: float = 0.0
    distillation: float = 0.0
    alignment: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            check_at_least(name, weight, 0.0)
        if not any(asdict(self).values()):
            raise expected("weights of a phase", "positive for at least one term", asdict(self))


class NBA(Distillation):
    r"""Remove a backdoor by aligning the student's behaviour on pseudo samples with benign behaviour.

    In the first ``labelled_share`` of its epochs the student S minimises, with the weights of ``labelled``,

    .. math::
        \mu\, CE(S(x + d), y) + \beta\, KL(S_0(x) \| S(x + d)) + \lambda\, \textrm{mean}_l
        \| \phi(f_l(S, x + d)) - \phi(f_l(S_0, x)) \|^2

    and in the others the same on mixed images m without labels, with the weights of ``mixed``. x are clean images as
    the loader augments them; d perturbations that make S disagree with the teacher T, on a share of each batch and 0 on
    the rest; phi the knowledge form; and S_0 the suspicious network as it came. ``align_with="teacher"`` puts T in the
    place of S_0 in the last term.

    Source: the three elements are those of Ying & Wu, "NBA: defensive distillation for backdoor removal via neural
    behavior alignment", Cybersecurity 6:20, 2023 (arXiv 2406.10846), abstract; the equations are ours.

    Args:
        model: the suspicious network, the student.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        teacher: the teacher, of the student's layers: a network, or the defence that made it.
        teacher_weights: a file with the weights of a teacher of the student's architecture, instead of ``teacher``.
        layers: module paths of the observed layers; ``None`` takes the network's own default.
        behavior: the knowledge form phi; channel Gram matrices by default.
        pseudo: how pseudo samples are crafted; one universal perturbation by default.
        pseudo_share: share of each batch that is perturbed; 0 crafts none.
        labelled: weights of the terms in the epochs with labels.
        labelled_share: share of the epochs with labels.
        mixed: weights of the terms in the epochs with mixed images, which have no labels.
        mixing: how images are mixed; CutMix by default.
        align_with: whose behaviour is the benign one, ``"suspicious"`` or ``"teacher"``.
        jitter: random shift and flip of the perturbations; ``None`` leaves them in place.
        regenerate_every_n_epochs: see :class:`~nba_lightning.callbacks.PseudoSampleRegeneration`.
        lr: initial learning rate.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: for a negative weight, a share outside [0, 1], epochs without any term, an unknown layer, too few
            layers for the knowledge form, weights that do not fit; at the ``setup`` of a fit if no teacher was given.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        teacher: nn.Module | None = None,
        teacher_weights: str | None = None,
        layers: Sequence[str] | None = None,
        behavior: Behavior | None = None,
        pseudo: PseudoSamples | None = None,
        pseudo_share: float = 0.5,
        labelled: Weights = Weights(cross_entropy=2.0, distillation=4.0, alignment=1.0),  # noqa: B008
        labelled_share: float = 0.35,
        mixed: Weights = Weights(distillation=8.0, alignment=1.0),  # noqa: B008
        mixing: CutMix | None = None,
        align_with: AlignWith = "suspicious",
        jitter: RandomCropFlip | None = None,
        regenerate_every_n_epochs: int = 1,
        lr: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, teacher, teacher_weights, lr=lr, **kwargs)
        check_range("pseudo_share", pseudo_share, 0.0, 1.0)
        check_range("labelled_share", labelled_share, 0.0, 1.0)
        check_choice("align_with", align_with, get_args(AlignWith))
        if mixed.cross_entropy:
            raise expected("mixed", "without `cross_entropy`, since mixed images have no labels", mixed)
        self.labelled, self.labelled_share, self.mixed = labelled, labelled_share, mixed
        self.mixing, self.align_with, self.pseudo_share = mixing or CutMix(), align_with, pseudo_share
        self.behavior, self.pseudo = behavior or ChannelGram(), pseudo or UniversalPerturbations()
        self.jitter, self.regenerate_every_n_epochs = jitter, regenerate_every_n_epochs
        aligns = any(phase.alignment for phase in self._phases())
        self.layers = resolve_layers(model, layers) if aligns else []
        if aligns and len(self.layers) < self.behavior.min_layers:
            raise expected("layers", f"at least {self.behavior.min_layers} for {type(self.behavior).__name__}", layers)
        if aligns and align_with == "teacher" and self.teacher is not None:
            resolve_layers(self.teacher.network, self.layers)
        asked = any(phase.distillation or (phase.alignment and align_with == "suspicious") for phase in self._phases())
        self.suspicious = Frozen(model) if asked else None

    def _phases(self) -> list[Weights]:
        return [self.labelled] * (self.labelled_share > 0) + [self.mixed] * (self.labelled_share < 1)

    @property
    def needs_teacher(self) -> bool:
        """Whether crafting or aligning asks the teacher."""
        return self.pseudo_share > 0 or (bool(self.layers) and self.align_with == "teacher")

    @property
    def learns_labels(self) -> bool:
        """Whether this epoch is one with labels; all are in a fit without a last epoch."""
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 0:
            return self.labelled_share > 0
        return self.trainer.current_epoch < round(self.labelled_share * epochs)

    def configure_callbacks(self) -> list[Callback]:
        """Regenerate the pseudo samples, if there are any."""
        inherited = super().configure_callbacks()
        if not self.pseudo_share:
            return inherited
        return [*inherited, *unless_given(self._trainer, PseudoSampleRegeneration(self.regenerate_every_n_epochs))]

    def regenerate(self) -> None:
        """Craft against the current student; see :class:`~nba_lightning.pseudo.PseudoSamples`."""
        generator = generator_for(self.seed, 4, self.trainer.current_epoch, device=self.device)
        batches = (batch.images for batch in clean_batches(self.trainer))
        with self.trainer.precision_plugin.forward_context():
            self.pseudo.regenerate(self.model, self.teacher_network(), batches, generator, self.reduce)

    def observed_layers(self) -> list[str]:
        """The layers that are aligned."""
        return self.layers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The terms of this epoch whose weight is not 0."""
        images, labels = self.unpack(batch, batch_idx)
        generator = generator_for(
            self.seed, 5, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        phase = self.labelled if self.learns_labels else self.mixed
        if phase is self.mixed:
            images = self.mixing(images, generator)
        answers, benign = self._benign(images, phase)
        layers = self.layers if phase.alignment else []
        logits, observed = features(self.model, self._perturbed(images, generator), layers)
        terms: dict[str, Tensor] = {}
        if phase is self.labelled:
            self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        if phase.cross_entropy:
            terms["ce"] = phase.cross_entropy * F.cross_entropy(logits, labels)
        if phase.distillation:
            assert answers is not None
            terms["kl"] = phase.distillation * kl_divergence(answers, logits).mean()
        if phase.alignment:
            terms["alignment"] = phase.alignment * alignment_loss(self.behavior(observed), benign)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def _benign(self, images: Tensor, phase: Weights) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the images should give: the suspicious network's answers, and the behaviours to align with."""
        answers, observed, own = None, dict[str, Tensor](), self.align_with == "suspicious"
        layers = self.layers if phase.alignment else []
        if self.suspicious is not None and (phase.distillation or (layers and own)):
            answers, observed = features(self.suspicious.network, images, layers if own else [])
        if layers and not own:
            observed = features(self.teacher_network(), images, layers)[1]
        return answers, self.behavior(observed) if layers else {}

    def _perturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, its first ``pseudo_share`` as pseudo samples; loaders shuffle, so these are drawn at random."""
        number = round(self.pseudo_share * len(images))
        if number == 0:
            return images
        perturbations = self.pseudo(images[:number], self.model, self.teacher_network(), generator)
        if self.jitter is not None:
            perturbations = self.jitter(perturbations, generator)
        return torch.cat([(images[:number] + perturbations).clamp(0.0, 1.0), images[number:]]).to(images.dtype)
