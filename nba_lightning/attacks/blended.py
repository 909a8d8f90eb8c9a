"""Blended: a full-size pattern mixed into the image."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nba_lightning.attacks.base import Attack
from nba_lightning.core.checks import check_range, expected
from nba_lightning.io.images import pattern_or_noise


class Blended(Attack):
    r"""A pattern as large as the image is mixed in, :math:`x' = (1 - \alpha) x + \alpha p`.

    Source: Chen et al., "Targeted backdoor attacks on deep learning systems using data poisoning", 2017
    (arXiv 1712.05526), section 4 (blended injection; a random pattern or a cartoon image, alpha 0.2).

    Args:
        alpha: share of the pattern, in (0, 1].
        pattern: an image file without transparency, resized to the images; ``None`` is uniform noise drawn from
            ``pattern_seed``.
        pattern_seed: seed of the noise.
        **kwargs: target, poisoning rate and the like of :class:`~nba_lightning.attacks.base.Attack`.

    Raises:
        ValueError: if alpha is out of range or the pattern is no image file that
            :func:`~nba_lightning.io.images.read_image` reads.
    """

    blend: Tensor

    def __init__(
        self,
        alpha: float = 0.2,
        pattern: str | None = None,
        pattern_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_range("alpha", alpha, 0.0, 1.0, open_low=True)
        if pattern is not None and not Path(pattern).is_file():
            raise expected("pattern", "an existing image file", repr(pattern))
        self.alpha, self.pattern, self.pattern_seed = alpha, pattern, pattern_seed

    def arguments(self) -> dict[str, Any]:
        """As usual; of the image file its name, since folders move and the picture itself is in the state."""
        return super().arguments() | {"pattern": None if self.pattern is None else Path(self.pattern).name}

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the pattern `(C, H, W)`."""
        self.register_buffer("blend", pattern_or_noise(self.pattern, image_shape, self.pattern_seed))

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Mix the pattern in."""
        return torch.lerp(images, self.blend.to(images).expand_as(images), self.alpha)
