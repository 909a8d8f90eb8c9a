"""Input-aware dynamic: a generator draws another trigger for every image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.attacks.base import Attack, TrainingImages
from nba_lightning.core.checks import check_at_least, expected


class InputAware(Attack):
    r"""A generated pattern replaces the pixels under a generated mask, :math:`x' = x + (g(x) - x) \odot m(x)`.

    Both networks are trained by :class:`nba_lightning.implants.InputAwareTraining`, the pattern's together with the
    classifier. Training also sees images with *another* image's trigger, which keep their label.

    Source: Nguyen & Tran, "Input-aware dynamic backdoor attack", NeurIPS 2020 (arXiv 2010.08138), sections 3.2 to 3.4
    (poisoning and cross rates of 0.1). The authors draw the poisoned images anew in every batch; here they are fixed
    indices, so that ``poison_rate`` means the same for every attack and the defender's images stay clean. Group
    instead of batch normalisation keeps every trigger a function of its own image.

    Args:
        width: channels of the two networks' first stage, a multiple of 8.
        cross_ratio: images with another image's trigger for each triggered one.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    def __init__(self, width: int = 32, cross_ratio: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if width < 8 or width % 8:
            raise expected("width", "a positive multiple of 8", width)
        check_at_least("cross_ratio", cross_ratio, 0.0)
        self.width, self.cross_ratio = width, cross_ratio

    @property
    def needs_compute(self) -> bool:
        """The networks are trained."""
        return True

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the two networks."""
        channels = image_shape[0]
        self.pattern_network = Autoencoder(channels, channels, self.width)
        self.mask_network = Autoencoder(channels, 1, self.width)

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Nothing can be computed beforehand."""
        if not self.ready:
            raise ValueError(
                "Expected `attack` to be trained for InputAware: fit nba_lightning.implants.InputAwareTraining, or "
                "name the checkpoint of such a training as `state`."
            )

    def pattern(self, images: Tensor) -> Tensor:
        """Patterns `(B, C, H, W)` in [0, 1]."""
        raw: Tensor = self.pattern_network(images)
        return raw.tanh() / 2 + 0.5

    def mask(self, images: Tensor) -> Tensor:
        """Nearly binary masks `(B, 1, H, W)` in [0, 1]."""
        raw: Tensor = self.mask_network(images)
        soft = raw.tanh() / 2 + 0.5
        return (20 * soft - 10).tanh() / 2 + 0.5

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Every image gets its own trigger."""
        return self.mix(images, images)

    def apply_cross(self, images: Tensor, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Every image gets its neighbour's trigger."""
        return self.mix(images[rows], images[(rows + 1) % len(images)])

    def mix(self, images: Tensor, others: Tensor) -> Tensor:
        """Put the triggers of ``others`` on ``images``, both `(B, C, H, W)`."""
        inputs = others.to(next(self.parameters()).dtype)
        return torch.lerp(images, self.pattern(inputs).to(images), self.mask(inputs).to(images))


class Autoencoder(nn.Module):
    """Three stages down and up again; `(B, C, H, W)` to float32 `(B, out_channels, H, W)` of any size."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_block(i, o) for i, o in zip([in_channels, *widths[:-1]], widths, strict=True))
        self.middle = _block(widths[-1], widths[-1])
        self.up = nn.ModuleList(_block(i, o) for i, o in zip(widths[::-1], [*widths[-2::-1], width], strict=True))
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode and decode."""
        sizes = []
        features = images
        for stage in self.down:
            features = stage(features)
            sizes.append(features.shape[-2:])
            features = F.max_pool2d(features, 2, ceil_mode=True)
        features = self.middle(features)
        for stage, size in zip(self.up, reversed(sizes), strict=True):
            features = stage(F.interpolate(features, size, mode="bilinear", align_corners=False))
        output: Tensor = self.last(features)
        # In half precision what follows would be flat long before it is 0 or 1: a mask once empty would stay so.
        return output.float()


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.GroupNorm(8, out_channels),
        nn.ReLU(),
    )
