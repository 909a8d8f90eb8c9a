"""LC: label-consistent poisoning."""

from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from nba_lightning.attacks.base import TrainingImages
from nba_lightning.attacks.surrogate import SurrogateAttack, input_gradient
from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import predict
from nba_lightning.core.randomness import generator_for

# The lower right corner, from the authors' code; the left corners mirror it.
_CORNER = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
_BATCH = 250


class LC(SurrogateAttack):
    r"""Poisoned images of the target class are made hard to recognise, then get a patch in each corner. Clean label.

    Before training, each poisoned image is moved inside an :math:`\ell_\infty` ball to where the surrogate's loss for
    its true class is highest (projected gradient descent), so that the network leans on the patches instead. Test
    images get the patches alone.

    Source: Turner et al., "Label-consistent backdoor attacks", 2019 (arXiv 1912.02771), section 4.2 (adversarial
    perturbations; bounds of 8, 16 and 32 of 255 were compared) and 5.2 (four corners; amplitude). The patches are
    those of the authors' code, black and white at amplitude 1. The bound of 16 follows the recipe of ANP's authors,
    which poisons 80 % of the class; public benchmarks take 8 of 255 in 100 steps of 1.5. Number and length of our
    steps are our choice. Half of a class of CIFAR-10 is poisoned by default.

    Args:
        surrogate: see :class:`~nba_lightning.attacks.surrogate.SurrogateAttack`.
        surrogate_weights: likewise.
        epsilon: bound on each value's change, in units of the image range [0, 1].
        steps: gradient steps of the adversarial perturbation.
        amplitude: strength of the patches, in (0, 1].
        patch_seed: seed of the perturbations' random start.
        poison_rate: share of the whole training set; see :class:`~nba_lightning.attacks.base.Attack`.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    allows_all_to_all = False
    clean_label = True
    corners: Tensor
    replaced: Tensor
    adversarial: Tensor

    def __init__(
        self,
        surrogate: torch.nn.Module | None = None,
        surrogate_weights: str | None = None,
        epsilon: float = 16 / 255,
        steps: int = 30,
        amplitude: float = 1.0,
        patch_seed: int = 0,
        poison_rate: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(surrogate, surrogate_weights, poison_rate=poison_rate, **kwargs)
        check_range("epsilon", epsilon, 0.0, 1.0)
        check_at_least("steps", steps, 1)
        check_range("amplitude", amplitude, 0.0, 1.0, open_low=True)
        self.epsilon, self.steps, self.amplitude, self.patch_seed = epsilon, steps, amplitude, patch_seed

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build the signed patches `(H, W)`."""
        _, height, width = image_shape
        if min(height, width) < 6:
            raise expected("images", "at least 6 pixels high and wide for the four patches", f"{height}x{width}")
        corners = torch.zeros(height, width)
        for rows in (slice(0, 3), slice(-3, None)):
            corners[rows, -3:] = _CORNER
            corners[rows, :3] = _CORNER.flip(1)
        self.register_buffer("corners", self.amplitude * corners, persistent=False)
        self.register_buffer("replaced", torch.empty(0, dtype=torch.int64))
        self.register_buffer("adversarial", torch.empty((0, *image_shape), dtype=torch.uint8))

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Lighten and darken the corners."""
        return images + self.corners.to(images)

    def bases(self) -> Tensor | None:
        """The adversarial images, once computed."""
        return self.adversarial.cpu() if len(self.adversarial) else None

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Make the adversarial images; with a progress bar."""
        if len(self.adversarial):
            if not torch.equal(self.replaced.cpu(), poisoned):
                raise expected(
                    "state",
                    "of a training with the same data, seed, target and poisoning rate",
                    "other poisoned images",
                )
            return
        network, generator = self.need_surrogate(device), generator_for(self.patch_seed, device=device)
        parts = [
            self._adversarial(
                network, images.read(part).to(device).float() / 255, images.labels[part].to(device), generator
            )
            for part in track(torch.split(poisoned, _BATCH), "LC: adversarial images", transient=True)
        ]
        self.adversarial, self.replaced = torch.cat(parts), poisoned.clone()

    def _adversarial(
        self, network: torch.nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        # Step size 2.5 epsilon over all steps (Madry et al., ICLR 2018, section 5.2).
        step, low, high = 2.5 * self.epsilon / self.steps, images - self.epsilon, images + self.epsilon
        start = torch.rand(images.shape, generator=generator, device=images.device) * 2 - 1
        moved = (images + self.epsilon * start).clamp(0.0, 1.0)
        for _ in range(self.steps):
            leaf = moved.detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(predict(network, leaf), labels, reduction="sum")
            moved = leaf.detach() + step * input_gradient(loss, leaf).sign()
            moved = torch.maximum(torch.minimum(moved, high), low).clamp(0.0, 1.0)
        return (moved * 255).round().to(torch.uint8).cpu()
