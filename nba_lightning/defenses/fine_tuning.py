"""Fine-tuning: the plainest defence, and the teacher of NBA."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from nba_lightning.callbacks.given import unless_given
from nba_lightning.callbacks.pseudo_samples import PseudoSampleRegeneration
from nba_lightning.core.augmentation import CutMix
from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.batches import plain_images
from nba_lightning.pseudo import LatentPerturbations, PseudoSamples, SamplePerturbations, UniversalPerturbations
from nba_lightning.training.cost import number_of_classes, passes_of_paced_crafting
from nba_lightning.training.defense import Defense
from nba_lightning.training.schedule import epochs_of_crafted
from nba_lightning.training.sweep import USUAL_RATE


class FineTuning(Defense):
    r"""Go on training the suspicious network on the defender's clean images.

    With ``pseudo``, a share of each batch carries synthetic triggers and keeps its labels, and with ``mixed_share`` a
    share is mixed by CutMix, labels too: then it minimises :math:`CE(S(z), \tilde y)` for these images z and mixed
    labels. With ``latent``, features of a share of the images are perturbed on their way through the network. All three
    together make the teacher of :class:`~nba_lightning.defenses.NBA`.

    Args:
        model: the suspicious network.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        pseudo: synthetic triggers, such as :class:`~nba_lightning.pseudo.TriggerFamilies`; ``None`` for none.
        pseudo_share: share of each batch that carries them, in [0, 1].
        mixed_share: share of each batch that is mixed by CutMix, in [0, 1].
        latent: how features are perturbed; ``None`` for not at all.
        latent_share: share of each batch whose features are, in [0, 1]: the last images, where the first have triggers.
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
        latent: LatentPerturbations | None = None,
        latent_share: float = 1 / 3,
        lr: float | None = 0.1,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, weights, lr=USUAL_RATE["SGD"] if lr is None else lr, warmup=warmup, **kwargs)
        if lr is None:
            self.fit_to_network(USUAL_RATE)
        check_range("pseudo_share", pseudo_share, 0.0, 1.0)
        check_range("mixed_share", mixed_share, 0.0, 1.0)
        check_range("latent_share", latent_share, 0.0, 1.0)
        if isinstance(pseudo, UniversalPerturbations | SamplePerturbations):
            raise expected("pseudo", "samples that need no teacher, such as TriggerFamilies", type(pseudo).__name__)
        self.pseudo, self.pseudo_share, self.mixed_share = pseudo, pseudo_share, mixed_share
        self.mixing = CutMix()
        self.latent, self.latent_share = (latent if latent_share else None), latent_share
        self.layers = [] if self.latent is None else self.latent.layers_of(model)
        self.needs_whole_network = self.latent is not None  # for its hooks

    def setup(self, stage: str) -> None:
        """As usual; what was crafted in another fit is forgotten, before a checkpoint brings back this one's."""
        super().setup(stage)
        if stage == "fit" and self.latent is not None:
            self.latent.reset()

    def configure_callbacks(self) -> list[Callback]:
        """Craft perturbations of features anew, if there are any."""
        inherited = super().configure_callbacks()
        own = [] if self.latent is None else unless_given(self._trainer, PseudoSampleRegeneration())
        return [*inherited, *own]

    def least_epochs_of_pseudo_samples(self) -> int:
        """As many as there are steps in which perturbations serve at least."""
        return epochs_of_crafted(self.trainer)

    def observed_layers(self) -> list[str]:
        """The layers whose features are perturbed."""
        return self.layers

    def passes_beside(self, epochs: int, images: int, batch: int) -> dict[str, int]:
        """See :meth:`Classifier.passes_beside`; synthetic triggers are not searched here."""
        if self.latent is None:
            return {}
        passes = self.latent.passes(batch // self.trainer.world_size, number_of_classes(self))
        return {"crafting": passes_of_paced_crafting(self, epochs, passes)}

    def regenerate(self) -> None:
        """Craft perturbations of features for the network as it is now."""
        if self.latent is not None:
            generator = generator_for(self.seed, 22, self.trainer.current_epoch, device=self.device)
            with self.trainer.precision_plugin.forward_context():
                self.latent.regenerate(self.model, plain_images(self.trainer), generator, self.reduce)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy, of plain images or of what was made of them."""
        if self.pseudo is None and not self.mixed_share and self.latent is None:
            return super().training_step(batch, batch_idx)
        images, labels = self.unpack(batch, batch_idx)
        generator = generator_for(
            self.seed, 9, self.trainer.global_rank, self.trainer.current_epoch, batch_idx, device=images.device
        )
        images, partners, share = self._mixed(images, generator)
        images = self._triggered(images, generator)
        with self._perturbed(self.trainer.global_step, generator):
            logits = predict(self.model, images)
        own, other = (F.cross_entropy(logits, target, reduction="none") for target in (labels, labels[partners]))
        loss = torch.lerp(own, other, share).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _perturbed(self, turn: int, generator: torch.Generator) -> AbstractContextManager[None]:
        """A ``with`` block in which features are perturbed, if they are at all."""
        if self.latent is None:
            return nullcontext()
        return self.latent.within(self.model, self.latent_share, turn, generator)

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
