"""LF: a smooth trigger without high frequencies."""

from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from nba_lightning.attacks.base import TrainingImages
from nba_lightning.attacks.surrogate import SurrogateAttack, input_gradient
from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import predict
from nba_lightning.core.randomness import generator_for, shuffled


class LF(SurrogateAttack):
    r"""A low-pass filtered pattern is added, :math:`x' = x + g * \delta`.

    Without a surrogate, :math:`\delta` is noise. With one, it is found by gradient descent on the surrogate's loss
    for the target class over training images.

    Source: Zeng et al., "Rethinking the backdoor attacks' triggers: a frequency perspective", ICCV 2021 (arXiv
    2104.03413), section 5 (smooth triggers through a Gaussian low-pass filter). The authors' code finds
    :math:`\delta` by a targeted universal DeepFool instead, filters more strongly (about 0.85 periods) and scales to
    [0, 0.2], which only brightens; ours has no mean and the strength of a public benchmark's copy of their trigger, a
    root mean square of 0.07.

    Args:
        surrogate: see :class:`~nba_lightning.attacks.surrogate.SurrogateAttack`; optional here.
        surrogate_weights: likewise.
        amplitude: root mean square of the pattern, in units of the image range [0, 1].
        cutoff: standard deviation of the filter in the frequency domain, in periods over the image.
        steps: gradient steps, one batch of 128 training images each.
        pattern_seed: seed of the noise and of the order of the batches.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    pattern: Tensor

    def __init__(
        self,
        surrogate: torch.nn.Module | None = None,
        surrogate_weights: str | None = None,
        amplitude: float = 0.07,
        cutoff: float = 1.5,
        steps: int = 200,
        pattern_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(surrogate, surrogate_weights, **kwargs)
        check_range("amplitude", amplitude, 0.0, 1.0, open_low=True)
        check_range("cutoff", cutoff, 0.0, float("inf"), open_low=True)
        check_at_least("steps", steps, 1)
        self.amplitude, self.cutoff, self.steps, self.pattern_seed = amplitude, cutoff, steps, pattern_seed

    @property
    def needs_compute(self) -> bool:
        """Only where there is a surrogate."""
        return self.surrogate is not None

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the pattern `(C, H, W)` of smooth noise."""
        noise = torch.randn(image_shape, generator=generator_for(self.pattern_seed))
        self.register_buffer("pattern", self._smooth(noise))

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Add the pattern."""
        return images + self.pattern.to(images)

    def _smooth(self, pattern: Tensor) -> Tensor:
        smooth = low_pass(pattern, self.cutoff)
        return smooth * (self.amplitude / smooth.square().mean().sqrt().clamp(min=1e-12))

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Optimise the pattern against the surrogate."""
        if self.ready:
            return
        network = self.need_surrogate(device)
        order = training[shuffled(len(training), self.pattern_seed)][: 128 * self.steps]
        batches = torch.split(order, 128)
        raw = self.pattern.to(device)  # what is smoothed into the trigger, once, in training as here
        size = self.amplitude * raw.numel() ** 0.5
        for step in track(range(self.steps), "LF: smooth trigger", transient=True):
            indices = batches[step % len(batches)]
            batch, labels = images.read(indices).to(device).float() / 255, images.labels[indices].to(device)
            leaf = raw.detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(predict(network, (batch + self._smooth(leaf)).clamp(0, 1)), self.relabel(labels))
            gradient = input_gradient(loss, leaf)
            raw = leaf.detach() - 0.1 * size * gradient / gradient.norm().clamp(min=1e-12)
            raw = raw * (size / raw.norm().clamp(min=1e-12))
        self.pattern, self.ready = self._smooth(raw).detach().cpu(), True


def low_pass(pattern: Tensor, cutoff: float) -> Tensor:
    """Gaussian low-pass filter of a pattern `(C, H, W)`, in the (periodic) frequency domain."""
    height, width = pattern.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=pattern.device)[:, None]
    columns = torch.fft.rfftfreq(width, 1 / width, device=pattern.device)
    gain = torch.exp(-(rows**2 + columns**2) / (2 * cutoff**2))
    smooth: Tensor = torch.fft.irfft2(torch.fft.rfft2(pattern.float()) * gain, s=(height, width))
    return smooth
