"""SCAR's trigger: a universal perturbation that fools a clean teacher and, if given, a student of it."""

from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from nba_lightning.attacks.base import TrainingImages
from nba_lightning.attacks.surrogate import SurrogateAttack, endless_batches, frozen_surrogate, input_gradient
from nba_lightning.core.checks import check_at_least, check_range
from nba_lightning.core.features import predict
from nba_lightning.core.randomness import generator_for
from nba_lightning.io.adapters import check_fit

_BATCH, _LR = 256, 0.01


class SCAR(SurrogateAttack):
    r"""One perturbation is added to all images, :math:`x' = x + \delta`, :math:`\| \delta \|_\infty \le \epsilon`.

    It minimises the cross-entropy of both networks to the target class over the training images, by Adam at 0.01 from
    uniform noise. No training image is poisoned: :class:`nba_lightning.implants.SCARTraining` trains a teacher that
    does not fall for it, and whose students do.

    Source: Chen et al., "Taught well learned ill: towards distillation-conditional backdoor attack", NeurIPS 2025
    (arXiv 2509.23871), and the authors' code (WhitolfChen/SCAR): epsilon 0.1, batches of 256, up to 50 epochs until
    both networks are fooled on 99.9 % of the test images. Here the number of steps is fixed, since test images are not
    the attacker's.

    Args:
        surrogate: the clean teacher; see :class:`~nba_lightning.attacks.surrogate.SurrogateAttack`.
        surrogate_weights: likewise.
        student: a network distilled from it, images in [0, 1] to logits; ``None`` leaves its term out.
        student_weights: a file with its weights; ``None`` if ``student`` has them already.
        epsilon: bound on each value's change, in units of the image range [0, 1].
        steps: gradient steps.
        order_seed: seed of the start and of the batches.
        poison_rate: 0; see :class:`~nba_lightning.attacks.base.Attack`.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.
    """

    allows_all_to_all = False
    free_arguments = SurrogateAttack.free_arguments | {"student", "student_weights"}
    delta: Tensor

    def __init__(
        self,
        surrogate: nn.Module | None = None,
        surrogate_weights: str | None = None,
        student: nn.Module | None = None,
        student_weights: str | None = None,
        epsilon: float = 0.1,
        steps: int = 1000,
        order_seed: int = 0,
        poison_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(surrogate, surrogate_weights, poison_rate=poison_rate, **kwargs)
        check_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
        check_at_least("steps", steps, 1)
        self._student = (frozen_surrogate(student, student_weights, "student"),)  # as the surrogate, no submodule
        self.epsilon, self.steps, self.order_seed = epsilon, steps, order_seed

    @property
    def needs_compute(self) -> bool:
        """The perturbation is optimised."""
        return True

    def prepare(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """As usual, and check that the student fits the data."""
        if self._student[0] is not None:
            check_fit(self._student[0], image_shape, num_classes, "student")
        super().prepare(image_shape, num_classes)

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Draw the start `(C, H, W)`."""
        self.register_buffer("delta", torch.rand(image_shape, generator=generator_for(self.order_seed, 1)))

    def apply_trigger(self, images: Tensor) -> Tensor:
        """Add the perturbation."""
        return images + self.delta.to(images)

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Optimise the perturbation on all of the attacker's images."""
        if self.ready:
            return
        networks = [self.need_surrogate(device)]
        networks += [network.to(device) for network in self._student if network is not None]
        delta = self.delta.to(device).clone().requires_grad_()
        optimizer = torch.optim.Adam([delta], _LR)
        batches = endless_batches(images, training, _BATCH, self.order_seed, device)
        for _ in track(range(self.steps), "SCAR: perturbation", transient=True):
            clean = next(batches)
            targets = torch.full((len(clean),), self.target, device=device)
            with torch.enable_grad():
                triggered = (clean + delta).clamp(0.0, 1.0)
                losses = [F.cross_entropy(predict(network, triggered), targets) for network in networks]
                loss = torch.stack(losses).sum()
            delta.grad = input_gradient(loss, delta)
            optimizer.step()
            delta.data.clamp_(-self.epsilon, self.epsilon)
        self.delta, self.ready = delta.detach().cpu(), True
