"""Normalisation as a layer, so that every network takes images in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import expected


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel. Both travel with the weights.

    Args:
        mean: one value per channel, or one for all, in units of the image range [0, 1].
        std: likewise, above 0.
        channels: number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | float = 0.5, std: Sequence[float] | float = 0.25, channels: int = 3):
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            values = torch.tensor([value] if isinstance(value, int | float) else list(value), dtype=torch.float32)
            if len(values) not in (1, channels):
                raise expected(name, f"one value or {channels} values", value)
            if name == "std" and not bool((values > 0).all()):
                raise expected(name, "positive", value)
            self.register_buffer(name, values.expand(channels).clone().view(1, channels, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)`."""
        if images.shape[1] != self.mean.shape[1]:  # broadcasting would hide it
            raise expected("images", f"of {self.mean.shape[1]} channels", f"shape {tuple(images.shape)}")
        return (images - self.mean) / self.std
