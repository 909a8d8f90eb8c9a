"""Neural Behavioral Alignment."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from nba_lightning.behaviors.base import Behavior, alignment_loss
from nba_lightning.behaviors.gram import ChannelGram
from nba_lightning.callbacks.given import unless_given
from nba_lightning.callbacks.guard import answers
from nba_lightning.callbacks.pseudo_samples import PseudoSampleRegeneration
from nba_lightning.core.augmentation import CutMix
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import features
from nba_lightning.core.functional import kl_divergence
from nba_lightning.core.layers import resolve_layers
from nba_lightning.core.modes import Frozen
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.batches import clean_batches, plain_images
from nba_lightning.pseudo import PseudoSamples, TriggerFamilies
from nba_lightning.training.cost import epochs_of_pseudo_samples
from nba_lightning.training.distillation import Distillation
from nba_lightning.training.schedule import batches_of_an_epoch
from nba_lightning.training.sweep import STUDENT_SHARE, USUAL_RATE
from nba_lightning.training.verification import Verification

_RATES = {kind: STUDENT_SHARE * rate for kind, rate in USUAL_RATE.items()}


@dataclass
class Terms:
    """Weights of the terms of NBA's loss; a term whose weight is 0 is not computed.

    Args:
        cross_entropy: of the labels, on images that are not mixed.
        teacher: of the divergence from the teacher's answers.
        suspicious: of the divergence from the suspicious network's answers, which are verified when the fit ends.
        alignment: of the alignment of behaviours with the teacher's.

    Raises:
        ValueError: for a negative weight, or none that is positive.
    """

    cross_entropy: float = 0.0
    teacher: float = 0.0
    suspicious: float = 0.0
    alignment: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            check_at_least(name, weight, 0.0)
        if not any(asdict(self).values()):
            raise expected("terms", "positive for at least one term", asdict(self))


class NBA(Distillation):
    r"""Remove a backdoor by aligning the student's behaviour on pseudo samples with the teacher's benign behaviour.

    The student S starts from the teacher T, a copy of the suspicious network S_0 that was cleaned at the cost of some
    accuracy, and minimises

    .. math::
        \mu\, CE(S(z), y) + \beta_T\, KL(T(x) \| S(z)) + \beta_0\, KL(S_0(x) \| S(z)) + \lambda\, \textrm{mean}_l
        \| \phi(f_l(S, z)) - \phi(f_l(T, x)) \|^2

    x are clean images as the loader augments them, a share of them mixed by CutMix; z the same images, a share of them
    as pseudo samples; phi the knowledge form. So whatever a pseudo sample carries, the student should behave as on the
    image without it. S_0's answers bring back what the teacher forgot, and may bring back the backdoor: what was
    learned from them is verified when the fit ends (:class:`~nba_lightning.training.verification.Verification`), and
    the student keeps no more of it than passes. A fit that is ended early is verified as it ends.

    Source: the three elements are those of Ying & Wu, "NBA: defensive distillation for backdoor removal via neural
    behavior alignment", Cybersecurity 6:20, 2023 (arXiv 2406.10846), abstract; the equations are ours.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        teacher: the teacher, of the same architecture: a network, or the defence that made it.
        teacher_weights: a file with the teacher's weights, instead of ``teacher``.
        layers: module paths of the observed layers; ``None`` takes :func:`nba_lightning.core.layers.default_layers`.
        behavior: the knowledge form phi; channel Gram matrices by default.
        pseudo: how pseudo samples are made; synthetic triggers of many families by default.
        pseudo_share: share of each batch that are pseudo samples; 0 makes none.
        terms: weights of the terms.
        mixed_share: share of the images that are mixed, in [0, 1].
        mixing: how images are mixed; CutMix by default.
        verification: how what was learned from the suspicious network is verified.
        regenerate_every_n_epochs: see :class:`~nba_lightning.callbacks.PseudoSampleRegeneration`. With few images
            pseudo samples serve more epochs than that, so that crafting takes a third of the passes at most.
        lr: initial learning rate; a third of the teacher's does well. ``None`` fits the network: SGD at 0.017, or AdamW
            at 0.0003 for one with layer or group normalisation or depthwise convolutions.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: for a negative weight, a share outside [0, 1], an unknown layer, too few layers for the knowledge
            form, weights that do not fit; at the ``setup`` of a fit if no teacher was given, or one of another
            architecture.
    """

    accepted: Tensor
    """Share of what was learned that was kept; -1 before it was verified."""

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
        terms: Terms = Terms(suspicious=2.0, alignment=1.0),  # noqa: B008
        mixed_share: float = 1.0,
        mixing: CutMix | None = None,
        verification: Verification | None = None,
        regenerate_every_n_epochs: int = 1,
        lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, teacher, teacher_weights, lr=_RATES["SGD"] if lr is None else lr, **kwargs)
        if lr is None:
            self.fit_to_network(_RATES)
        check_range("pseudo_share", pseudo_share, 0.0, 1.0)
        check_range("mixed_share", mixed_share, 0.0, 1.0)
        if terms.cross_entropy and mixed_share == 1:
            raise expected(
                "mixed_share", "below 1 where `cross_entropy` is on: mixed images have no label", mixed_share
            )
        self.terms, self.pseudo_share, self.mixed_share = terms, pseudo_share, mixed_share
        self.behavior, self.pseudo, self.mixing = (
            behavior or ChannelGram(),
            pseudo or TriggerFamilies(),
            mixing or CutMix(),
        )
        self.verification = verification or Verification()
        self.regenerate_every_n_epochs = regenerate_every_n_epochs
        self.layers = resolve_layers(model, layers) if terms.alignment else []
        if terms.alignment and len(self.layers) < self.behavior.min_layers:
            raise expected("layers", f"at least {self.behavior.min_layers} for {type(self.behavior).__name__}", layers)
        self.suspicious = Frozen(model) if terms.suspicious else None
        self.register_buffer("accepted", torch.tensor(-1.0))
        self._seen: list[dict[str, Tensor]] = []

    def setup(self, stage: str) -> None:
        """As usual; a fit begins with the teacher's weights."""
        super().setup(stage)
        if stage == "fit" and self.accepted < 0:
            self._begin_with("teacher", "the student's", self.teacher_network())

    def configure_callbacks(self) -> list[Callback]:
        """Regenerate the pseudo samples, if there are any."""
        inherited = super().configure_callbacks()
        if not self.pseudo_share:
            return inherited
        return [*inherited, *unless_given(self._trainer, PseudoSampleRegeneration(self.regenerate_every_n_epochs))]

    def least_epochs_of_pseudo_samples(self) -> int:
        """See :func:`nba_lightning.training.cost.epochs_of_pseudo_samples`; 1 where a batch has no known size."""
        batch = getattr(self.trainer.train_dataloader, "batch_size", None)
        return 1 if batch is None else epochs_of_pseudo_samples(self, self.trainer.num_training_batches * batch, batch)

    def regenerate(self) -> None:
        """Make pseudo samples for the current student; see :class:`~nba_lightning.pseudo.PseudoSamples`."""
        generator = generator_for(self.seed, 4, self.trainer.current_epoch, device=self.device)
        batches = (batch.images for batch in clean_batches(self.trainer))
        with self.trainer.precision_plugin.forward_context():
            self.pseudo.regenerate(self.model, self.teacher_network(), batches, generator, self.reduce)

    def observed_layers(self) -> list[str]:
        """The layers that are aligned."""
        return self.layers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The terms whose weight is not 0."""
        images, labels = self.unpack(batch, batch_idx)
        generator = generator_for(
            self.seed, 5, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        mixed = round(self.mixed_share * len(images))
        # The last images are mixed and the first are pseudo samples; loaders shuffle, so these are drawn at random.
        plain = len(images) - mixed
        images = torch.cat([images[:plain], self.mixing(images, generator)[plain:]]) if mixed else images
        logits, observed = features(self.model, self._perturbed(images, generator), self.layers)
        terms = self._terms(images, labels[:plain], logits, observed)
        loss = torch.stack(list(terms.values())).sum()
        self._seen.append({name: value.detach() for name, value in terms.items()})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_start(self) -> None:
        """As usual; and forget the terms of a fit that broke off."""
        super().on_train_start()
        self._seen = []

    def on_train_epoch_end(self) -> None:
        """Log the mean of each term over the epoch; in each step it would cost as much as a small network does."""
        for name in self._seen[0] if self._seen else ():
            mean = torch.stack([step[name] for step in self._seen if name in step]).mean()
            self.log(f"train/{name}", mean, sync_dist=True)
        self._seen = []

    def _terms(self, images: Tensor, labels: Tensor, logits: Tensor, observed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each term times its weight, for the student's logits and features on pseudo samples of ``images``."""
        weights, found = self.terms, dict[str, Tensor]()
        if weights.cross_entropy and len(labels):
            found["cross_entropy"] = weights.cross_entropy * F.cross_entropy(logits[: len(labels)], labels)
        with torch.no_grad():
            benign, wanted = None, dict[str, Tensor]()
            if weights.teacher or weights.alignment:
                benign, wanted = features(self.teacher_network(), images, self.layers)
            known = None if self.suspicious is None else features(self.suspicious.network, images, [])[0]
        if weights.teacher and benign is not None:
            found["teacher"] = weights.teacher * kl_divergence(benign, logits).mean()
        if known is not None:
            found["suspicious"] = weights.suspicious * kl_divergence(known, logits).mean()
        if weights.alignment:
            apart = alignment_loss(self.behavior(observed), self.behavior(wanted))
            found["alignment"] = weights.alignment * apart
        return found

    def _perturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The batch `(B, C, H, W)`, its first ``pseudo_share`` as pseudo samples."""
        return self.pseudo.put_on(images, self.pseudo_share, self.model, self.teacher_network(), generator)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As usual; and verify with the last step, before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        if self.was_last_step():
            self._verify()

    def on_train_end(self) -> None:
        """A fit that ended early keeps nothing that was not verified."""
        if self.accepted < 0 and self.suspicious is not None:
            self._verify()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and what was found when it was verified."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["verification"] = self.verification.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As usual; and take that over, or forget what was found before where nothing was."""
        super().on_load_checkpoint(checkpoint)
        self.verification.load_state_dict(checkpoint.get("verification", {}))

    def _verify(self) -> None:
        """Keep as much of what was learned as passes."""
        if self.suspicious is None:
            return
        generator = generator_for(self.seed, 8, device=self.device)
        with self.trainer.precision_plugin.forward_context():
            share = self.verification.keep(
                self.model,
                self.teacher_network(),
                self.suspicious.network,
                plain_images(self.trainer),
                batches_of_an_epoch(self.trainer),
                generator,
                self.reduce,
                self._right,
            )
        self.accepted.fill_(share)

    def _right(self, network: nn.Module) -> tuple[float, int]:
        """Accuracy on the images that are held out, and their number; nothing where there are none."""
        found = answers(self.trainer, network)
        return (0.0, 0) if found is None else (found.accuracy().value, len(found.labels))
