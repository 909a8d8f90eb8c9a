"""What lets somebody else's networks and loaders in: ``.logits``, batches as dictionaries, normalisation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_range, expected, first_few
from nba_lightning.core.features import predict

_IMAGE_KEYS = ("images", "image", "pixel_values", "img", "inputs", "input", "x")
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")


class Normalized(nn.Module):
    r"""A network that was trained on normalised images, as one that takes images in [0, 1].

    All of this package works on images in [0, 1], so that perturbed images can be kept valid. The weights that come out
    are those of the inner network, under its own names.

    Args:
        network: takes :math:`(x - mean) / std`.
        mean: one value for each channel, or one for all.
        std: likewise, positive.
        loaders_normalize: whether the loaders yield normalised images too; then batches are brought back to [0, 1].

    Raises:
        ValueError: for a standard deviation that is not positive, or lists of different length.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], loaders_normalize: bool = True
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
        return self.network((images - self.mean.to(images)) / self.std.to(images))

    def denormalize(self, images: Tensor) -> Tensor:
        """Normalised images `(B, C, H, W)` to [0, 1]; what rounding took out of that range comes back into it."""
        found = images.float() * self.std.to(images.device) + self.mean.to(images.device)
        slack = 4 * torch.finfo(images.dtype).eps
        return torch.where((found + slack >= 0) & (found - slack <= 1), found.clamp(0.0, 1.0), found).to(images.dtype)


def bare(network: nn.Module) -> nn.Module:
    """The network itself, out of a :class:`Normalized`."""
    return network.network if isinstance(network, Normalized) else network


def unpack(batch: Any, network: nn.Module | None = None) -> list[Tensor]:
    """Images in [0, 1], labels and what follows them, from a loader's batch.

    Args:
        batch: ``(images, labels, ...)``, a mapping such as ``{"image": ..., "label": ...}`` or images alone.
        network: a :class:`Normalized` brings normalised images back.

    Raises:
        ValueError: if a mapping has no images or labels under a known name.
    """
    if isinstance(batch, Tensor):
        parts = [batch]
    elif isinstance(batch, Mapping):
        parts = [_pick(batch, _IMAGE_KEYS, "images"), _pick(batch, _LABEL_KEYS, "labels")]
    else:
        parts = list(batch)
    if isinstance(network, Normalized) and network.loaders_normalize:
        parts[0] = network.denormalize(parts[0])
    return parts


def _pick(batch: Mapping[str, Any], names: Sequence[str], what: str) -> Tensor:
    found = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"Expected the batch to hold {what} under one of {', '.join(names)}, but its keys are "
            f"{first_few(map(str, batch))}."
        )
    return found


@torch.no_grad()
def check_fit(model: nn.Module, image_shape: tuple[int, ...], num_classes: int, name: str = "model") -> None:
    """Run one empty image through the network.

    Raises:
        ValueError: if it does not take images of that shape or does not give one logit per class.
    """
    parameter: Tensor = next(model.parameters(), torch.zeros(()))
    probe = torch.zeros((2, *image_shape), device=parameter.device, dtype=parameter.dtype)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        logits = predict(model, probe)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise expected(
            name,
            f"a network that takes images of shape {tuple(image_shape)}",
            f"{type(model).__name__}, which fails with: {error}",
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    if tuple(logits.shape) != (2, num_classes):
        raise expected(
            name,
            f"a network with one logit for each of the data's {num_classes} classes",
            f"{type(model).__name__} with output of shape {tuple(logits.shape[1:])}",
        )
