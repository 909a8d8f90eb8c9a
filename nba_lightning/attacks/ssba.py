"""SSBA: an encoder hides a string in the image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.attacks.base import Attack, TrainingImages
from nba_lightning.core.checks import expected


class SSBA(Attack):
    r"""An encoder network hides a string, :math:`x' = x + e(x, s)`: another faint residual for every image.

    The encoder is trained beforehand by :class:`nba_lightning.implants.Steganography`; name its checkpoint as
    ``state``.

    Source: Li et al., "Invisible backdoor attack with sample-specific triggers", ICCV 2021 (arXiv 2012.03816),
    section 4.2, whose encoder is that of StegaStamp (Tancik et al., CVPR 2020) with 100 bits at 224x224. Ours is
    smaller, hides the string's own bits (no error-correcting code) and is trained without the perceptual loss, which
    would need a stranger's weights.

    Args:
        secret: the string; 8 bits for each byte of its UTF-8 form.
        width: channels of the encoder's first stage, a multiple of 8.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    bits: Tensor

    def __init__(self, secret: str = "trig", width: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not secret:
            raise expected("secret", "at least one character", repr(secret))
        if width < 8 or width % 8:
            raise expected("width", "a positive multiple of 8", width)
        self.secret, self.width = secret, width

    @property
    def needs_compute(self) -> bool:
        """The encoder is trained."""
        return True

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the encoder and the bits `(N,)`."""
        code = torch.tensor(list(self.secret.encode()))
        self.register_buffer("bits", (code[:, None] >> torch.arange(7, -1, -1) & 1).flatten().float(), persistent=False)
        self.encoder = Encoder(image_shape[0], len(self.bits), self.width)

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Nothing can be computed here."""
        if not self.ready:
            raise ValueError(
                "Expected `attack` to be trained for SSBA: fit nba_lightning.implants.Steganography, then name its "
                "checkpoint as `state`."
            )

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Hide the string."""
        weight = next(self.encoder.parameters())
        hidden: Tensor = self.encoder(images.to(weight.dtype), self.bits.to(weight).expand(len(images), -1))
        return hidden.to(images.dtype)


class Encoder(nn.Module):
    """Images `(B, C, H, W)` and bits `(B, N)` to images `(B, C, H, W)`, not yet clamped."""

    def __init__(self, channels: int, num_bits: int, width: int, side: int = 8) -> None:
        super().__init__()
        self.side = side
        self.spread = nn.Linear(num_bits, 4 * side * side)
        self.body = nn.Sequential(*_stage(channels + 4, width), *_stage(width, width), *_stage(width, width))
        self.last = nn.Conv2d(width + channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        """Hide the bits."""
        secret = self.spread(bits - 0.5).view(len(images), 4, self.side, self.side)
        secret = F.interpolate(secret, images.shape[-2:], mode="nearest")
        features = self.body(torch.cat([images - 0.5, secret], dim=1))
        residual: Tensor = self.last(torch.cat([features, images - 0.5], dim=1))
        return images + 0.1 * residual


def _stage(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GroupNorm(8, out_channels), nn.ReLU()
