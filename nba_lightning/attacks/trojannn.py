"""TrojanNN: a patch that fires chosen neurons."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from nba_lightning.attacks.base import TrainingImages
from nba_lightning.attacks.surrogate import SurrogateAttack, input_gradient
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import features
from nba_lightning.core.layers import resolve_layers
from nba_lightning.core.randomness import generator_for


class TrojanNN(SurrogateAttack):
    r"""The patch is optimised so that few neurons of a trained network answer to it strongly.

    .. math:: \min_p \sum_n (v_n(m \odot p) - t)^2

    over the values p under the mask m, for neurons n of one layer with target activation t. The neurons are those
    with the largest sum of absolute weights to the next layer, so that they are easy to drive and to learn from.

    Source: Liu et al., "Trojaning attack on neural networks", NDSS 2018, section IV-A (neuron selection, equation 2;
    the loss, algorithm 1) and VI (a square of 7 % of the image, there at 70 % transparency; opaque here by default).
    The paper selects by weights to the preceding layer, the authors' code and a public benchmark by those to the
    following one, as we do. Two neurons of the last features and a target of 100 follow that benchmark; its square
    lies in the corner, the authors' a little inside. The poisoned network is trained from scratch on the original
    images, as there, where the paper retrains the given network on reverse-engineered ones.

    Args:
        surrogate: see :class:`~nba_lightning.attacks.surrogate.SurrogateAttack`.
        surrogate_weights: likewise.
        layer: module path of the layer; ``None`` is the last of the surrogate's own default layers.
        neurons: channels of that layer; ``None`` selects two by their weights in the network's last linear layer.
        activation: target activation t, averaged over positions.
        size: side of the patch in pixels; ``None`` covers 7 % of the image.
        opacity: share of the patch in the pixels under it, in (0, 1].
        steps: gradient steps.
        pattern_seed: seed of the patch's random start.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    mask: Tensor
    pattern: Tensor
    free_arguments = SurrogateAttack.free_arguments | {"layer", "neurons"}  # resolved in the surrogate

    def __init__(
        self,
        surrogate: nn.Module | None = None,
        surrogate_weights: str | None = None,
        layer: str | None = None,
        neurons: Sequence[int] | None = None,
        activation: float = 100.0,
        size: int | None = None,
        opacity: float = 1.0,
        steps: int = 1000,
        pattern_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(surrogate, surrogate_weights, **kwargs)
        check_range("opacity", opacity, 0.0, 1.0, open_low=True)
        check_at_least("steps", steps, 1)
        if size is not None:
            check_at_least("size", size, 1)
        if surrogate is not None:
            layer = resolve_layers(surrogate, None if layer is None else [layer])[-1]
        self.layer, self.neurons, self.activation = layer, neurons, activation
        self.size, self.opacity, self.steps, self.pattern_seed = size, opacity, steps, pattern_seed

    @property
    def needs_compute(self) -> bool:
        """The patch is optimised."""
        return True

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the mask `(1, H, W)` and the start of the patch `(C, H, W)`."""
        _, height, width = image_shape
        size = self.size or max(1, round((0.07 * height * width) ** 0.5))
        if size > min(height, width):
            raise expected("size", f"at most the image's {min(height, width)} pixels", size)
        mask = torch.zeros(1, height, width)
        mask[:, height - size :, width - size :] = 1.0
        if self.surrogate is not None:
            self._check_neurons(self.surrogate, image_shape)
        noise = torch.rand(image_shape, generator=generator_for(self.pattern_seed))
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("pattern", mask * noise)

    def _check_neurons(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        assert self.layer is not None
        weight = next(network.parameters(), torch.zeros(()))
        with torch.no_grad():
            observed = features(network, weight.new_zeros(1, *image_shape), [self.layer])[1][self.layer]
        if observed.ndim != 4:
            raise expected("layer", "one with feature maps (B, C, H, W)", f"{self.layer!r} of {tuple(observed.shape)}")
        wrong = [neuron for neuron in self.neurons or () if not 0 <= neuron < observed.shape[1]]
        if wrong:
            raise expected("neurons", f"channels 0 to {observed.shape[1] - 1} of {self.layer!r}", wrong)
        if self.neurons is None:
            self.neurons = _strongest(network, self.layer, observed.shape[1])

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Mix the patch in."""
        return torch.lerp(images, self.pattern.to(images), self.opacity * self.mask.to(images))

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Optimise the patch."""
        if self.ready:
            return
        network = self.need_surrogate(device)
        assert self.layer is not None
        neurons = torch.tensor(self.neurons, device=device)
        mask, pattern = self.mask.to(device), self.pattern.to(device)
        for _ in track(range(self.steps), "TrojanNN: patch", transient=True):
            leaf = pattern.detach().requires_grad_()
            with torch.enable_grad():
                _, observed = features(network, leaf[None], [self.layer])
                value = observed[self.layer].float().flatten(2).mean(dim=2)[0]
                loss = (value[neurons] - self.activation).square().sum()
            step = mask * input_gradient(loss, leaf)
            # The steps have the same length whatever the scale of the activations: 1 % of the range, at most.
            pattern = (leaf.detach() - 0.01 * step / step.abs().max().clamp(min=1e-12)).clamp(0.0, 1.0)
        self.pattern, self.ready = pattern.detach().cpu(), True


def _strongest(network: nn.Module, layer: str, channels: int, number: int = 2) -> list[int]:
    """The channels with the largest sum of absolute weights in the network's last linear layer."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].in_features != channels:
        raise expected(
            "neurons",
            f"channels of {layer!r}, since its {channels} channels do not feed the network's last linear layer",
            None,
        )
    return linear[-1].weight.abs().sum(dim=0).topk(min(number, channels)).indices.tolist()
