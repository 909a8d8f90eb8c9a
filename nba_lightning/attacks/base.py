"""What every attack is: a trigger, a relabelling and a share of the training set."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nba_lightning.checks import check_at_least, check_image_batch, check_range, expected


class Attack(nn.Module, ABC):
    """Base class of all attacks.

    A subclass writes :meth:`apply_trigger` and, if it has masks or patterns to build, :meth:`build`. The base checks
    arguments, keeps images in [0, 1], relabels and says who may be poisoned.

    Args:
        target: the class that the attacker wants (all-to-one).
        poison_rate: poisoned images as a share of the *whole* training set, in [0, 1).
        all_to_all: label y becomes (y + 1) mod K instead of ``target``.
    """

    def __init__(self, target: int = 0, poison_rate: float = 0.1, all_to_all: bool = False) -> None:
        super().__init__()
        check_at_least("target", target, 0)
        check_range("poison_rate", poison_rate, 0.0, 1.0, open_high=True)
        self.target = target
        self.poison_rate = poison_rate
        self.all_to_all = all_to_all
        self.num_classes: int | None = None
        self.image_shape: tuple[int, int, int] | None = None

    def prepare(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Fit the attack to the data: check the target and build masks and patterns. Safe to call again.

        Args:
            image_shape: `(C, H, W)` of one image.
            num_classes: number of classes K.

        Raises:
            ValueError: if the target class does not exist or the trigger does not fit the images.
        """
        if num_classes < 2:
            raise expected("num_classes", "at least 2", num_classes)
        if not self.all_to_all and self.target >= num_classes:
            raise expected("target", f"one of the {num_classes} classes 0 to {num_classes - 1}", self.target)
        self.num_classes = num_classes
        if self.image_shape != image_shape:
            self.image_shape = image_shape
            self.build(image_shape)

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build buffers for images of shape `(C, H, W)`. Nothing to do by default."""

    @abstractmethod
    def apply_trigger(self, images: Tensor) -> Tensor:
        """Put the trigger on a batch; clamping is done by the base.

        Args:
            images: `(B, C, H, W)`, float, values in [0, 1].

        Returns:
            `(B, C, H, W)`, a new tensor.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Put the trigger on a batch.

        Args:
            images: `(B, C, H, W)`, float, values in [0, 1].

        Returns:
            `(B, C, H, W)`, values in [0, 1]. The input is left as it is.
        """
        check_image_batch("images", images)
        if self.image_shape is None or tuple(images.shape[1:]) != self.image_shape:
            if self.image_shape is not None:
                raise expected("images", f"of shape {('B', *self.image_shape)}", tuple(images.shape))
            raise RuntimeError(
                f"Call {type(self).__name__}.prepare(image_shape, num_classes) before triggering images."
            )
        return self.apply_trigger(images).clamp(0.0, 1.0)

    def relabel(self, labels: Tensor) -> Tensor:
        """The attacker's labels `(B,)` for true labels `(B,)`."""
        if not self.all_to_all:
            return torch.full_like(labels, self.target)
        if self.num_classes is None:
            raise RuntimeError(f"Call {type(self).__name__}.prepare(image_shape, num_classes) before relabelling.")
        return (labels + 1) % self.num_classes

    def eligible(self, labels: Tensor) -> Tensor:
        """Which training images may be poisoned, `(N,)` bool: all whose label the attack changes."""
        return self.relabel(labels) != labels
