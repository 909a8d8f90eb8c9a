"""Neural Behavioral Alignment."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from nba_lightning.adapters import predict
from nba_lightning.augmentation import RandomCropFlip
from nba_lightning.behaviors.base import Behavior, alignment_loss
from nba_lightning.behaviors.gram import ChannelGram
from nba_lightning.callbacks.pseudo_samples import PseudoSampleRegeneration
from nba_lightning.checks import check_at_least, check_choice, expected
from nba_lightning.features import features, resolve_layers
from nba_lightning.functional import kl_divergence
from nba_lightning.modules.distillation import Distillation
from nba_lightning.modules.statistics import frozen_statistics
from nba_lightning.pseudo import PseudoSamples, UniversalPerturbations
from nba_lightning.randomness import generator_for

AlignWith = Literal["suspicious", "teacher"]


class NBA(Distillation):
    r"""Remove a backdoor by aligning the student's behaviour on pseudo samples with benign behaviour.

    .. math::
        \alpha\, CE(S(x), y) + \beta\, KL(S_0(x) \| S(x)) + \mu\, CE(S(x + d), y) + \lambda\, \textrm{mean}_l
        \| \phi(f_l(S, x + d)) - \phi(f_l(S_0, x)) \|^2

    x are clean images as the loader augments them, d perturbations that make the student S disagree with the teacher
    T, phi the knowledge form, and S_0 the suspicious network as it came: on clean images it behaves without its
    backdoor, and better than anything trained on the few clean images does. ``align_with="teacher"`` puts T in its
    place in the last term. One ``fit`` does it all: the first ``teacher_epochs`` epochs fine-tune the suspicious
    network into the teacher; then the student starts from the suspicious weights. A term whose weight is 0 is not
    computed.

    Source: the three elements are those of Ying & Wu, "NBA: defensive distillation for backdoor removal via neural
    behavior alignment", Cybersecurity 6:20, 2023 (arXiv 2406.10846), abstract; the equations are ours.

    Args:
        model: the suspicious network, the student.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        teacher: a teacher that is given, of the student's layers; ``None`` fine-tunes one.
        teacher_weights: a file with the weights of a given teacher of the student's architecture.
        teacher_epochs: epochs that fine-tune the teacher, out of the Trainer's ``max_epochs``.
        layers: module paths of the observed layers; ``None`` takes the network's own default.
        behavior: the knowledge form phi; channel Gram matrices by default.
        pseudo: how pseudo samples are crafted; one universal perturbation by default.
        alignment: weight lambda of the alignment.
        pseudo_cross_entropy: weight mu of the cross-entropy on pseudo samples.
        clean_cross_entropy: weight alpha of the cross-entropy on clean images.
        clean_distillation: weight beta of the divergence from the suspicious network's answers on clean images.
        align_with: whose behaviour on clean images is the benign one, ``"suspicious"`` or ``"teacher"``.
        jitter: random shift and flip of the perturbations; ``None`` leaves them in place.
        regenerate_every_n_epochs: see :class:`~nba_lightning.callbacks.PseudoSampleRegeneration`.
        lr: initial learning rate of the student.
        **kwargs: ``teacher_lr`` (a high one is what rids the teacher of the backdoor) and ``warmup`` of
            :class:`~nba_lightning.modules.distillation.Distillation`, and further arguments of
            :class:`~nba_lightning.modules.base.Classifier`.

    Raises:
        ValueError: for a negative weight, an unknown layer, too few layers for the knowledge form, weights that do
            not fit; at ``setup`` if ``max_epochs`` leaves no epoch for the alignment.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        teacher: nn.Module | None = None,
        teacher_weights: str | None = None,
        teacher_epochs: int = 10,
        layers: Sequence[str] | None = None,
        behavior: Behavior | None = None,
        pseudo: PseudoSamples | None = None,
        alignment: float = 1.0,
        pseudo_cross_entropy: float = 1.0,
        clean_cross_entropy: float = 1.0,
        clean_distillation: float = 4.0,
        align_with: AlignWith = "suspicious",
        jitter: RandomCropFlip | None = None,
        regenerate_every_n_epochs: int = 1,
        lr: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            weights,
            teacher,
            teacher_weights,
            teacher_epochs,
            needs_teacher=alignment > 0 or pseudo_cross_entropy > 0,
            lr=lr,
            **kwargs,
        )
        terms = {
            "alignment": alignment,
            "pseudo_cross_entropy": pseudo_cross_entropy,
            "clean_cross_entropy": clean_cross_entropy,
            "clean_distillation": clean_distillation,
        }
        for name, weight in terms.items():
            check_at_least(name, weight, 0.0)
        if not any(terms.values()):
            raise expected("alignment", "positive where all other terms are 0", alignment)
        check_choice("align_with", align_with, get_args(AlignWith))
        self.align_with = align_with
        self.alignment, self.pseudo_cross_entropy = alignment, pseudo_cross_entropy
        self.clean_cross_entropy, self.clean_distillation = clean_cross_entropy, clean_distillation
        self.behavior, self.pseudo = behavior or ChannelGram(), pseudo or UniversalPerturbations()
        self.jitter, self.regenerate_every_n_epochs = jitter, regenerate_every_n_epochs
        self.layers = resolve_layers(model, layers) if alignment else []
        if alignment and len(self.layers) < self.behavior.min_layers:
            raise expected("layers", f"at least {self.behavior.min_layers} for {type(self.behavior).__name__}", layers)
        if alignment and align_with == "teacher":
            resolve_layers(self.teacher, self.layers)
        asked = clean_distillation or (alignment and align_with == "suspicious")
        self.suspicious = copy.deepcopy(model).requires_grad_(False).eval() if asked else None

    @property
    def uses_pseudo_samples(self) -> bool:
        """Whether any term on pseudo samples is on."""
        return self.alignment > 0 or self.pseudo_cross_entropy > 0

    def train(self, mode: bool = True) -> "NBA":
        """As usual, but the teacher and the suspicious network stay in ``eval`` mode."""
        super().train(mode)
        if self.suspicious is not None:
            self.suspicious.eval()
        return self

    def configure_callbacks(self) -> list[Callback]:
        """Regenerate the pseudo samples, if any term needs them."""
        regeneration = [PseudoSampleRegeneration(self.regenerate_every_n_epochs)] if self.uses_pseudo_samples else []
        return [*super().configure_callbacks(), *regeneration]

    def enter_phase(self) -> bool:
        """Begin what this epoch is for; whether it uses pseudo samples."""
        return super().enter_phase() and self.uses_pseudo_samples

    def regenerate_pseudo_samples(self, batches: Iterator[Tensor]) -> None:
        """Craft against the current student; see :class:`~nba_lightning.pseudo.PseudoSamples`."""
        generator = generator_for(self.seed, 4, self.trainer.current_epoch, device=self.device)
        with self.trainer.precision_plugin.forward_context():
            self.pseudo.regenerate(self.model, self.teacher, batches, generator, self.reduce)

    def observed_layers(self) -> list[str]:
        """The layers that are aligned."""
        return self.layers

    def student_step(self, images: Tensor, labels: Tensor, batch_idx: int) -> Tensor:
        """The terms whose weight is not 0."""
        terms: dict[str, Tensor] = {}
        answers, benign = self._benign(images)
        if self.clean_cross_entropy or self.clean_distillation:
            logits = predict(self.model, images)
            if self.clean_cross_entropy:
                terms["clean_ce"] = self.clean_cross_entropy * F.cross_entropy(logits, labels)
            if answers is not None:
                terms["clean_kl"] = self.clean_distillation * kl_divergence(answers, logits).mean()
            self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        if self.uses_pseudo_samples:
            terms |= self._pseudo_terms(images, labels, batch_idx, benign)
        for name, value in terms.items():
            self.log(f"train/{name}", value)
        return torch.stack(list(terms.values())).sum()

    @torch.no_grad()
    def _benign(self, images: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What clean images should give: the suspicious network's answers, and the behaviours to align with."""
        answers, observed = None, dict[str, Tensor]()
        own = self.align_with == "suspicious"
        if self.suspicious is not None:
            answers, observed = features(self.suspicious, images, self.layers if own else [])
        if self.alignment and not own:
            observed = features(self.teacher, images, self.layers)[1]
        return answers if self.clean_distillation else None, self.behavior(observed) if self.alignment else {}

    def _pseudo_terms(
        self, images: Tensor, labels: Tensor, batch_idx: int, benign: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        generator = generator_for(
            self.seed, 5, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        perturbations = self.pseudo(images, self.model, self.teacher, generator)
        if self.jitter is not None:
            perturbations = self.jitter(perturbations, generator)
        with frozen_statistics(self.model):
            logits, observed = features(self.model, (images + perturbations).clamp(0.0, 1.0), self.layers)
        terms: dict[str, Tensor] = {}
        if self.pseudo_cross_entropy:
            terms["pseudo_ce"] = self.pseudo_cross_entropy * F.cross_entropy(logits, labels)
        if self.alignment:
            terms["alignment"] = self.alignment * alignment_loss(self.behavior(observed), benign)
        return terms
