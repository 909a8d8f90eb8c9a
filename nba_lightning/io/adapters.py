"""What lets somebody else's networks in: normalisation, several outputs, and whether they fit the data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating


class Normalized(nn.Module):
    r"""A network that was trained on normalised images, as one that takes images in [0, 1].

    All of this package works on images in [0, 1], so that perturbed images can be kept valid; here is the one place
    that says how they are normalised. The weights that come out are the inner network's, under its own names.

    Args:
        network: takes :math:`(x - mean) / std`.
        mean: one value for each channel, or one for all.
        std: likewise, positive.
        loaders_normalize: whether your loaders yield normalised images too; then batches are brought back to [0, 1].
            What the loaders yield is checked against it.

    Raises:
        ValueError: for a standard deviation that is not positive, lists of different length, or images with another
            number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], loaders_normalize: bool = False
    ) -> None:
        super().__init__()
        for value in std:
            check_range("std", value, 0.0, float("inf"), open_low=True)
        if len(mean) != len(std):
            raise expected("std", f"as long as `mean` ({len(mean)})", len(std))
        self.network, self.loaders_normalize = network, loaders_normalize
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def feature_layers(self) -> list[str] | None:
        """The inner network's own default, if it has one."""
        inner = getattr(self.network, "feature_layers", None)
        return None if inner is None else [f"network.{name}" for name in inner]

    def forward(self, images: Tensor) -> Any:
        """Images `(B, C, H, W)` in [0, 1] to what the inner network gives."""
        self._check_channels(images)
        return self.network((images - self.mean.to(images)) / self.std.to(images))

    def denormalize(self, images: Tensor) -> Tensor:
        """Normalised images `(B, C, H, W)` to [0, 1]; what rounding took out of that range comes back into it."""
        self._check_channels(images)
        found = images.float() * self.std.to(images.device) + self.mean.to(images.device)
        slack = 4 * torch.finfo(images.dtype).eps
        return torch.where((found + slack >= 0) & (found - slack <= 1), found.clamp(0.0, 1.0), found).to(images.dtype)

    def _check_channels(self, images: Tensor) -> None:
        # Else three values would make three channels out of a grey image's one.
        if images.ndim != 4 or len(self.mean) not in (1, images.shape[1]):
            raise expected("mean", f"one value or one for each channel of {tuple(images.shape)}", len(self.mean))


class Output(nn.Module):
    """A network that returns several things, of which one is the logits.

    Args:
        network: returns a tuple, list or mapping.
        which: the position or key of the logits in it.
    """

    def __init__(self, network: nn.Module, which: int | str) -> None:
        super().__init__()
        self.network, self.which = network, which

    @property
    def feature_layers(self) -> list[str] | None:
        """The inner network's own default, if it has one."""
        inner = getattr(self.network, "feature_layers", None)
        return None if inner is None else [f"network.{name}" for name in inner]

    def forward(self, images: Tensor) -> Any:
        """The chosen part of what the inner network gives."""
        return self.network(images)[self.which]


def bare(network: nn.Module) -> nn.Module:
    """The network itself, out of a :class:`Normalized` or :class:`Output`."""
    while isinstance(network, Normalized | Output):
        network = network.network
    return network


@torch.no_grad()
def check_fit(model: nn.Module, image_shape: tuple[int, ...], num_classes: int, name: str = "model") -> None:
    """Run one empty image through the network.

    Raises:
        ValueError: if it does not take images of that shape or does not give one logit per class.
        TypeError: if it does not return logits.
    """
    parameter: Tensor = next(model.parameters(), torch.zeros(()))
    probe = torch.zeros((2, *image_shape), device=parameter.device, dtype=parameter.dtype)
    try:
        with evaluating(model):
            logits = predict(model, probe)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise expected(
            name,
            f"a network that takes images of shape {tuple(image_shape)}",
            f"{type(model).__name__}, which fails with: {error}",
        ) from error
    if tuple(logits.shape) != (2, num_classes):
        raise expected(
            name,
            f"a network with one logit for each of the data's {num_classes} classes",
            f"{type(model).__name__} with output of shape {tuple(logits.shape[1:])}",
        )
