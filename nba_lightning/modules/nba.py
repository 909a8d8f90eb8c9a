"""Neural Behavioral Alignment."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nba_lightning.augmentation import RandomCropFlip
from nba_lightning.behaviors.base import Behavior, alignment_loss
from nba_lightning.behaviors.gram import ChannelGram
from nba_lightning.callbacks.pseudo_samples import PseudoSampleRegeneration
from nba_lightning.checks import check_at_least, check_range, expected
from nba_lightning.features import features, resolve_layers
from nba_lightning.functional import kl_divergence
from nba_lightning.modules.base import Defense
from nba_lightning.pseudo import PseudoSamples, UniversalPerturbations, evaluating
from nba_lightning.randomness import generator_for
from nba_lightning.weights import load_weights


class NBA(Defense):
    r"""Remove a backdoor by aligning the student's behaviour on pseudo samples with a fine-tuned teacher's.

    .. math::
        \alpha\, CE(S(x), y) + \beta\, KL(S_0(x) \| S(x)) + \mu\, CE(S(x + d), y) + \lambda\, \textrm{mean}_l
        \| \phi(f_l(S, x + d)) - \phi(f_l(T, x)) \|^2

    x are clean images as the loader augments them, d perturbations that make the student S disagree with the teacher
    T, phi the knowledge form, and S_0 the suspicious network as it came: it answers clean images without its backdoor,
    and better than anything trained on the few clean images does. One ``fit`` does it all: the first ``teacher_epochs``
    epochs fine-tune the suspicious network into the teacher; then the student starts from the suspicious weights. A
    term whose weight is 0 is not computed.

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
        jitter: random shift and flip of the perturbations; ``None`` leaves them in place.
        regenerate_every_n_epochs: see :class:`~nba_lightning.callbacks.PseudoSampleRegeneration`.
        lr: initial learning rate of the student.
        teacher_lr: initial learning rate of the teacher: a high one is what rids it of the backdoor.
        warmup: share of each phase over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.modules.base.Classifier`.

    Raises:
        ValueError: for a negative weight, an unknown layer, too few layers for the knowledge form, weights that do
            not fit; at ``setup`` if ``max_epochs`` leaves no epoch for the alignment.
    """

    teacher_ready: Tensor

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
        jitter: RandomCropFlip | None = None,
        regenerate_every_n_epochs: int = 1,
        lr: float = 0.02,
        teacher_lr: float = 0.1,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        check_range("teacher_lr", teacher_lr, 0.0, float("inf"), open_low=True)
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
        check_at_least("teacher_epochs", teacher_epochs, 0)
        self.alignment, self.pseudo_cross_entropy = alignment, pseudo_cross_entropy
        self.clean_cross_entropy, self.clean_distillation = clean_cross_entropy, clean_distillation
        self.teacher_lr = teacher_lr
        self.behavior, self.pseudo = behavior or ChannelGram(), pseudo or UniversalPerturbations()
        self.jitter, self.regenerate_every_n_epochs = jitter, regenerate_every_n_epochs
        self.layers = resolve_layers(model, layers) if alignment else []
        if alignment and len(self.layers) < self.behavior.min_layers:
            raise expected("layers", f"at least {self.behavior.min_layers} for {type(self.behavior).__name__}", layers)
        given = teacher is not None or teacher_weights is not None
        if not given and teacher_epochs == 0 and self.uses_pseudo_samples:
            raise expected("teacher_epochs", "at least 1 where no teacher is given", teacher_epochs)
        # While the teacher is being fine-tuned, `self.model` is what trains and `self.teacher` keeps the suspicious
        # weights; then the two change places. So one set of parameters trains in both phases.
        self.teacher = copy.deepcopy(model) if teacher is None else teacher
        if teacher_weights is not None:
            load_weights(self.teacher, teacher_weights)
        if alignment:
            resolve_layers(self.teacher, self.layers)
        self.teacher.requires_grad_(False).eval()
        self.suspicious = copy.deepcopy(model).requires_grad_(False).eval() if clean_distillation else None
        self.teacher_epochs = 0 if given or not self.uses_pseudo_samples else teacher_epochs
        self.register_buffer("teacher_ready", torch.tensor(self.teacher_epochs == 0))

    @property
    def uses_pseudo_samples(self) -> bool:
        """Whether any term on pseudo samples is on."""
        return self.alignment > 0 or self.pseudo_cross_entropy > 0

    def train(self, mode: bool = True) -> "NBA":
        """As usual, but the teacher and the suspicious network stay in ``eval`` mode."""
        super().train(mode)
        self.teacher.eval()
        if self.suspicious is not None:
            self.suspicious.eval()
        return self

    def setup(self, stage: str) -> None:
        """Check that there is time for both phases."""
        super().setup(stage)
        if stage != "fit":
            return
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # the teacher must be
        if getattr(self.trainer, "fast_dev_run", False):
            self.teacher_epochs = 0
        epochs = self.trainer.max_epochs
        if self.teacher_epochs and epochs is not None and 0 <= epochs <= self.teacher_epochs:
            raise expected("max_epochs", f"above the {self.teacher_epochs} `teacher_epochs`", epochs)

    def phases(self) -> list[tuple[int, float]]:
        """The learning rate falls to 0 once for the teacher and once for the student."""
        ((total, _),) = super().phases()
        if not self.teacher_epochs or not self.trainer.max_epochs or self.trainer.max_epochs < 0:
            return [(total, 1.0)]
        height = self.teacher_lr / self.lr if self.optimizer_factory is None else 1.0
        return [(total * self.teacher_epochs // self.trainer.max_epochs, height), (total, 1.0)]

    def configure_callbacks(self) -> list[Callback]:
        """Regenerate the pseudo samples, if any term needs them."""
        regeneration = [PseudoSampleRegeneration(self.regenerate_every_n_epochs)] if self.uses_pseudo_samples else []
        return [*super().configure_callbacks(), *regeneration]

    def enter_phase(self) -> bool:
        """Let student and teacher change places once the teacher is done; whether this epoch aligns."""
        if self.trainer.current_epoch < self.teacher_epochs:
            return False
        if not self.teacher_ready:
            exchange_weights(self.model, self.teacher)
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            optimizer.state.clear()
            self.teacher_ready.fill_(True)
            rank_zero_info(f"The teacher is fine-tuned ({self.teacher_epochs} epochs); now the student is aligned.")
        return self.uses_pseudo_samples

    def regenerate_pseudo_samples(self, batches: Iterator[Tensor]) -> None:
        """Craft against the current student; see :class:`~nba_lightning.pseudo.PseudoSamples`."""
        generator = generator_for(self.seed, 4, self.trainer.current_epoch, device=self.device)
        with evaluating(self.model, self.teacher), self.trainer.precision_plugin.forward_context():
            self.pseudo.regenerate(
                self.model,
                self.teacher,
                batches,
                generator,
                lambda tensor: self.trainer.strategy.reduce(tensor, reduce_op="mean"),
            )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The teacher's cross-entropy, or the terms of the student."""
        if self.trainer.current_epoch < self.teacher_epochs:
            return super().training_step(batch, batch_idx)
        images, labels = batch[0], batch[1]
        self.check_first_batch(images, batch_idx)
        terms: dict[str, Tensor] = {}
        if self.clean_cross_entropy or self.suspicious is not None:
            logits = self.model(images)
            if self.clean_cross_entropy:
                terms["clean_ce"] = self.clean_cross_entropy * F.cross_entropy(logits, labels)
            if self.suspicious is not None:
                with torch.no_grad():
                    answers = self.suspicious(images)
                terms["clean_kl"] = self.clean_distillation * kl_divergence(answers, logits).mean()
            self.log("train/acc", (logits.detach().argmax(dim=1) == labels).float().mean(), prog_bar=True)
        if self.uses_pseudo_samples:
            terms |= self._pseudo_terms(images, labels, batch_idx)
        for name, value in terms.items():
            self.log(f"train/{name}", value)
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _pseudo_terms(self, images: Tensor, labels: Tensor, batch_idx: int) -> dict[str, Tensor]:
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
            with torch.no_grad():
                wanted = self.behavior(features(self.teacher, images, self.layers)[1])
            terms["alignment"] = self.alignment * alignment_loss(self.behavior(observed), wanted)
        return terms


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Context in which BatchNorm normalises by the batch, if in training, but does not learn statistics from it."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@torch.no_grad()
def exchange_weights(first: nn.Module, second: nn.Module) -> None:
    """Let two networks of one architecture change weights and buffers, in place."""
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    first.load_state_dict(second.state_dict())
    second.load_state_dict(kept)
