"""Neural Behavioral Alignment."""

import copy
from collections.abc import Iterator, Sequence
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
from nba_lightning.core.randomness import generator_for
from nba_lightning.pseudo import PseudoSamples, UniversalPerturbations
from nba_lightning.training.distillation import Distillation

AlignWith = Literal["suspicious", "teacher"]


class NBA(Distillation):
    r"""Remove a backdoor by aligning the student's behaviour on pseudo samples with benign behaviour.

    In the first ``labelled`` share of its epochs the student S minimises

    .. math::
        \mu\, CE(S(x + d), y) + \beta\, KL(S_0(x) \| S(x + d)) + \lambda\, \textrm{mean}_l
        \| \phi(f_l(S, x + d)) - \phi(f_l(S_0, x)) \|^2

    and in the others, on mixed images m without labels,

    .. math::
        \beta_m\, KL(S_0(m) \| S(m + d)) + \lambda\, \textrm{mean}_l \| \phi(f_l(S, m + d)) - \phi(f_l(S_0, m)) \|^2

    x are clean images as the loader augments them; d perturbations that make S disagree with the teacher T, on a
    share of each batch and 0 on the rest; phi the knowledge form; and S_0 the suspicious network as it came: on clean
    images it behaves without its backdoor, and better than anything trained on the few clean images does. Labels rid
    S of the backdoor; then mixed images, on which S_0 can be asked without end, give its accuracy back.
    ``align_with="teacher"`` puts T in the place of S_0 in the last term. One ``fit`` does it all: the first
    ``teacher_epochs`` epochs fine-tune the suspicious network into the teacher; then the student starts from the
    suspicious weights. A term whose weight is 0 is not computed.

    Source: the three elements are those of Ying & Wu, "NBA: defensive distillation for backdoor removal via neural
    behavior alignment", Cybersecurity 6:20, 2023 (arXiv 2406.10846), abstract; the equations are ours.

    Args:
        model: the suspicious network, the student.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        teacher: a teacher that is given, of the student's layers; ``None`` fine-tunes one. It should differ from the
            student in the backdoor alone: one that was trained on its own served no better, though nobody poisoned it.
        teacher_weights: a file with the weights of a given teacher of the student's architecture.
        teacher_epochs: epochs that fine-tune the teacher, out of the Trainer's ``max_epochs``.
        layers: module paths of the observed layers; ``None`` takes the network's own default.
        behavior: the knowledge form phi; channel Gram matrices by default.
        pseudo: how pseudo samples are crafted; one universal perturbation by default.
        pseudo_share: share of each batch that is perturbed; 0 crafts none.
        alignment: weight lambda of the alignment.
        cross_entropy: weight mu of the cross-entropy.
        distillation: weight beta of the divergence from the suspicious network's answers.
        labelled: share of the student's epochs with labels.
        mixing: how images are mixed in the others; CutMix by default.
        mixed_distillation: weight beta_m of the divergence from the suspicious network's answers on mixed images.
        align_with: whose behaviour is the benign one, ``"suspicious"`` or ``"teacher"``.
        jitter: random shift and flip of the perturbations; ``None`` leaves them in place.
        regenerate_every_n_epochs: see :class:`~nba_lightning.callbacks.PseudoSampleRegeneration`.
        lr: initial learning rate of the student.
        **kwargs: ``teacher_lr`` (a high one is what rids the teacher of the backdoor) and ``warmup`` of
            :class:`~nba_lightning.training.distillation.Distillation`, and further arguments of
            :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: for a negative weight, a share outside [0, 1], epochs without any term, an unknown layer, too few
            layers for the knowledge form, weights that do not fit; at ``setup`` if ``max_epochs`` leaves no epoch for
            the alignment.
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
        pseudo_share: float = 0.5,
        alignment: float = 1.0,
        cross_entropy: float = 2.0,
        distillation: float = 4.0,
        labelled: float = 0.35,
        mixing: CutMix | None = None,
        mixed_distillation: float = 8.0,
        align_with: AlignWith = "suspicious",
        jitter: RandomCropFlip | None = None,
        regenerate_every_n_epochs: int = 1,
        lr: float = 0.02,
        **kwargs: Any,
    ) -> None:
        asks_teacher = alignment > 0 and align_with == "teacher"
        super().__init__(
            model,
            weights,
            teacher,
            teacher_weights,
            teacher_epochs,
            needs_teacher=pseudo_share > 0 or asks_teacher,
            lr=lr,
            **kwargs,
        )
        terms = {
            "alignment": alignment,
            "cross_entropy": cross_entropy,
            "distillation": distillation,
            "mixed_distillation": mixed_distillation,
        }
        for name, weight in terms.items():
            check_at_least(name, weight, 0.0)
        check_range("pseudo_share", pseudo_share, 0.0, 1.0)
        check_range("labelled", labelled, 0.0, 1.0)
        check_choice("align_with", align_with, get_args(AlignWith))
        if labelled > 0 and not (alignment or cross_entropy or distillation):
            raise expected(
                "cross_entropy", "positive where no other term is on in the epochs with labels", cross_entropy
            )
        if labelled < 1 and not (alignment or mixed_distillation):
            raise expected(
                "mixed_distillation", "positive where `labelled` is below 1 and `alignment` 0", mixed_distillation
            )
        self.alignment, self.cross_entropy, self.distillation = alignment, cross_entropy, distillation
        self.labelled, self.mixing, self.mixed_distillation = labelled, mixing or CutMix(), mixed_distillation
        self.align_with, self.pseudo_share = align_with, pseudo_share
        self.behavior, self.pseudo = behavior or ChannelGram(), pseudo or UniversalPerturbations()
        self.jitter, self.regenerate_every_n_epochs = jitter, regenerate_every_n_epochs
        self.layers = resolve_layers(model, layers) if alignment else []
        if alignment and len(self.layers) < self.behavior.min_layers:
            raise expected("layers", f"at least {self.behavior.min_layers} for {type(self.behavior).__name__}", layers)
        if asks_teacher:
            resolve_layers(self.teacher, self.layers)
        answers = (labelled > 0 and distillation) or (labelled < 1 and mixed_distillation)
        asked = answers or (alignment and not asks_teacher)
        self.suspicious = copy.deepcopy(model).requires_grad_(False).eval() if asked else None

    @property
    def uses_pseudo_samples(self) -> bool:
        """Whether any image is perturbed."""
        return self.pseudo_share > 0

    @property
    def learns_labels(self) -> bool:
        """Whether this epoch is one with labels; all are in a fit without an end."""
        return self.trainer.current_epoch - self.teacher_epochs < self.labelled * self.student_epochs

    def train(self, mode: bool = True) -> "NBA":
        """As usual, but the teacher and the suspicious network stay in ``eval`` mode."""
        super().train(mode)
        if self.suspicious is not None:
            self.suspicious.eval()
        return self

    def configure_callbacks(self) -> list[Callback]:
        """Regenerate the pseudo samples, if there are any."""
        inherited = super().configure_callbacks()
        if not self.uses_pseudo_samples:
            return inherited
        return [*inherited, *unless_given(self._trainer, PseudoSampleRegeneration(self.regenerate_every_n_epochs))]

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
        """The terms of this epoch whose weight is not 0."""
        generator = generator_for(
            self.seed, 5, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        labelled = self.learns_labels
        if not labelled:
            images = self.mixing(images, generator)
        distillation = self.distillation if labelled else self.mixed_distillation
        answers, benign = self._benign(images, distillation > 0)
        logits, observed = features(self.model, self._perturbed(images, generator), self.layers)
        terms: dict[str, Tensor] = {}
        if labelled:
            self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
            if self.cross_entropy:
                terms["ce"] = self.cross_entropy * F.cross_entropy(logits, labels)
        if answers is not None:
            terms["kl"] = distillation * kl_divergence(answers, logits).mean()
        if self.alignment:
            terms["alignment"] = self.alignment * alignment_loss(self.behavior(observed), benign)
        for name, value in terms.items():
            self.log(f"train/{name}", value)
        return torch.stack(list(terms.values())).sum()

    @torch.no_grad()
    def _benign(self, images: Tensor, distils: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the images should give: the suspicious network's answers, and the behaviours to align with."""
        answers, observed = None, dict[str, Tensor]()
        own = self.align_with == "suspicious"
        if self.suspicious is not None and (distils or (self.alignment and own)):
            answers, observed = features(self.suspicious, images, self.layers if own else [])
        if self.alignment and not own:
            observed = features(self.teacher, images, self.layers)[1]
        return answers if distils else None, self.behavior(observed) if self.alignment else {}

    def _perturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, its first ``pseudo_share`` as pseudo samples; loaders shuffle, so these are drawn at random."""
        number = round(self.pseudo_share * len(images))
        if number == 0:
            return images
        perturbations = self.pseudo(images[:number], self.model, self.teacher, generator)
        if self.jitter is not None:
            perturbations = self.jitter(perturbations, generator)
        return torch.cat([(images[:number] + perturbations).clamp(0.0, 1.0), images[number:]]).to(images.dtype)
