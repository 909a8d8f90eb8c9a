"""Training of SSBA's encoder, which hides a string in an image."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio

from nba_lightning.attacks.ssba import SSBA
from nba_lightning.callbacks.finite_loss import FiniteLoss
from nba_lightning.core.checks import check_at_least, check_range, check_unit_range, expected
from nba_lightning.core.randomness import generator_for
from nba_lightning.implants.untriggered import untriggered_roles, without_attack
from nba_lightning.io.batches import as_batch


class Steganography(pl.LightningModule):
    r"""Train an encoder that hides random bits in images, with a decoder that reads them.

    The loss is :math:`BCE(d(x'), s) + \lambda \|x' - x\|^2` for an image x, bits s and the encoder's image x'.

    The DataModule's attack must be an :class:`~nba_lightning.attacks.SSBA`, whose encoder this trains, and its
    ``train_on`` ``untriggered``. The attack's state travels in the checkpoint, to be named as ``state`` of the attack
    afterwards. Logs ``val/bit_accuracy`` and ``val/psnr`` (dB) on clean images.

    Source: Li et al., ICCV 2021 (arXiv 2012.03816), section 4.2, after Tancik et al., "StegaStamp", CVPR 2020
    (arXiv 1904.05343); see :class:`~nba_lightning.attacks.SSBA` for what is left out.

    Args:
        lr: learning rate of Adam.
        image_weight: weight :math:`\lambda` of the mean squared error, reached linearly over the fit's first half. At
            100 the string hides at 40 dB, where a small network that is trained for a few epochs does not learn it.
        seed: seed of the random bits.
    """

    attack: SSBA
    decoder: nn.Module

    def __init__(self, lr: float = 2e-3, image_weight: float = 10.0, seed: int = 0) -> None:
        super().__init__()
        check_range("lr", lr, 0.0, float("inf"), open_low=True)
        check_at_least("image_weight", image_weight, 0.0)
        self.save_hyperparameters(logger=False)
        self.lr, self.image_weight, self.seed = lr, image_weight, seed
        self.strict_loading = False  # the checkpoint holds the attack in the DataModule's part
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)

    def setup(self, stage: str) -> None:
        """Take the encoder from the DataModule's attack."""
        data: Any = getattr(self.trainer, "datamodule", None)
        attack = getattr(data, "attack", None)
        if not isinstance(attack, SSBA):
            raise expected("attack", "an SSBA for Steganography", type(attack).__name__)
        self.attack = attack
        attack.ready = attack.ready or stage == "fit"
        if not hasattr(self, "decoder"):
            self.decoder = _decoder(data.image_shape[0], len(attack.bits), attack.width)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the attack to the DataModule, which saves and restores it."""
        checkpoint["state_dict"] = without_attack(checkpoint["state_dict"])

    def configure_callbacks(self) -> list[Callback]:
        """Stop at a loss that is not finite."""
        return [FiniteLoss()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam for encoder and decoder."""
        return torch.optim.Adam([*self.attack.encoder.parameters(), *self.decoder.parameters()], self.lr)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Hide random bits and read them again."""
        untriggered_roles(batch, self)
        images = as_batch(batch).images
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        if step == 0:
            check_unit_range("images", images)
        half = max(1.0, self.trainer.estimated_stepping_batches / 2)
        generator = generator_for(self.seed, self.trainer.global_rank, step, device=images.device)
        shape = (len(images), len(self.attack.bits))
        bits = torch.randint(0, 2, shape, generator=generator, device=images.device).float()
        hidden = self.attack.encoder(images, bits)
        answer = self.decoder(hidden.clamp(0.0, 1.0) - 0.5)
        distortion = F.mse_loss(hidden, images)
        loss = F.binary_cross_entropy_with_logits(answer, bits)
        loss = loss + self.image_weight * min(1.0, step / half) * distortion
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/bit_accuracy", ((answer > 0) == (bits > 0.5)).float().mean(), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """How well the string is read again, and how much it shows."""
        if dataloader_idx != 0:
            return
        images = as_batch(batch).images
        hidden = self.attack.apply_trigger(images).clamp(0.0, 1.0)
        right = ((self.decoder(hidden - 0.5) > 0) == (self.attack.bits > 0.5)).float().mean()
        self.psnr.update(hidden, images)
        settings: dict[str, Any] = {"on_epoch": True, "prog_bar": True, "add_dataloader_idx": False}
        self.log("val/bit_accuracy", right, batch_size=len(images), sync_dist=True, **settings)
        self.log("val/psnr", self.psnr, batch_size=len(images), **settings)


def _decoder(channels: int, num_bits: int, width: int) -> nn.Module:
    def stage(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        return convolution, nn.GroupNorm(8, out_channels), nn.ReLU()

    return nn.Sequential(
        *stage(channels, width, 1),
        *stage(width, 2 * width, 2),
        *stage(2 * width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, num_bits),
    )
