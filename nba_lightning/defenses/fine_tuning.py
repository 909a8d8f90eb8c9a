"""Fine-tuning: the plainest defence, and the teacher of NBA."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.augmentation import CutMix
from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.randomness import generator_for
from nba_lightning.pseudo import PseudoSamples, SamplePerturbations, UniversalPerturbations
from nba_lightning.training.defense import Defense
from nba_lightning.training.sweep import USUAL_RATE


class FineTuning(Defense):
    r"""Go on training the suspicious network on the defender's clean images.

    With ``pseudo``, a share of each batch carries synthetic triggers and keeps its labels, and with ``mixed_share`` a
    share is mixed by CutMix, labels too: then it minimises :math:`CE(S(z), \tilde y)` for these images z and mixed
    labels. This makes the teacher of :class:`~nba_lightning.defenses.NBA`.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        pseudo: synthetic triggers, such as :class:`~nba_lightning.pseudo.TriggerFamilies`; ``None`` for none.
        pseudo_share: share of each batch that carries them, in [0, 1].
        mixed_share: share of each batch that is mixed by CutMix, in [0, 1].
        lr: initial learning rate; a high one is what removes backdoors. ``None`` fits the network: SGD at 0.05, or
            AdamW at 0.001 for one with layer or group normalisation or depthwise convolutions.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: for a share outside [0, 1], or pseudo samples that are crafted with a teacher.
    """

    needs_whole_network = False

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        pseudo: PseudoSamples | None = None,
        pseudo_share: float = 0.5,
        mixed_share: float = 0.0,
        lr: float | None = 0.1,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=USUAL_RATE["SGD"] if lr is None else lr, warmup=warmup, **kwargs)
        if lr is None:
            self.fit_to_network(USUAL_RATE)
        check_range("pseudo_share", pseudo_share, 0.0, 1.0)
        check_range("mixed_share", mixed_share, 0.0, 1.0)
        if isinstance(pseudo, UniversalPerturbations | SamplePerturbations):
            raise expected("pseudo", "samples that need no teacher, such as TriggerFamilies", type(pseudo).__name__)
        self.pseudo, self.pseudo_share, self.mixed_share = pseudo, pseudo_share, mixed_share
        self.mixing = CutMix()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy, of plain images or of what was made of them."""
        if self.pseudo is None and not self.mixed_share:
            return super().training_step(batch, batch_idx)
        images, labels = self.unpack(batch, batch_idx)
        generator = generator_for(
            self.seed, 9, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        images, partners, share = self._mixed(images, generator)
        logits = predict(self.model, self._triggered(images, generator))
        own, other = (F.cross_entropy(logits, target, reduction="none") for target in (labels, labels[partners]))
        loss = torch.lerp(own, other, share).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _mixed(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images, a random share of them mixed; their partners, and the share of each image that is its partner's."""
        box, partners = self.mixing.boxes(images, generator)
        box = box & (torch.rand(box.shape[0], generator=generator, device=box.device) < self.mixed_share).view(
            -1, 1, 1, 1
        )
        return torch.where(box, images[partners], images), partners, box.float().mean(dim=(1, 2, 3))

    def _triggered(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, its first ``pseudo_share`` with triggers; loaders shuffle, so these are drawn at random."""
        return images if self.pseudo is None else self.pseudo.put_on(images, self.pseudo_share, generator=generator)
