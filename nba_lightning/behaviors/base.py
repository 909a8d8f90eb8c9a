"""What every knowledge form is: features in, unit vectors out."""

from abc import ABC
from collections.abc import Mapping

from torch import Tensor, nn


class Behavior(nn.Module, ABC):
    """Base class of all knowledge forms: a high-level representation of a network's intermediate features.

    A form of single layers writes :meth:`describe`; a form that relates layers overrides :meth:`forward`. It never
    sees the model.
    """

    min_layers = 1
    """How many layers the form needs."""

    def describe(self, features: Tensor) -> Tensor:
        """Describe one layer.

        Args:
            features: `(B, C, H, W)` feature maps or `(B, T, D)` tokens.

        Returns:
            `(B, N)` float32, rows of Euclidean length 1 (or 0 where the features are all 0).
        """
        raise NotImplementedError(f"{type(self).__name__} must define `describe` or override `forward`.")

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Describe all captured layers.

        Args:
            features: from layer name to `(B, C, H, W)` or `(B, T, D)`, in network order.

        Returns:
            From name to `(B, N)` float32 with rows of length 1.
        """
        return {name: self.describe(value) for name, value in features.items()}


def alignment_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    r"""Mean over samples and layers of :math:`\| \phi_S - \phi_T \|^2`.

    Args:
        student: behaviours of the student, from name to `(B, N)` unit vectors.
        teacher: behaviours of the teacher under the same names; no gradient is needed.

    Returns:
        A scalar in [0, 4].
    """
    if student.keys() != teacher.keys():
        raise ValueError(f"Expected the same layers for both, but got {sorted(student)} and {sorted(teacher)}.")
    losses = [(student[name] - teacher[name]).square().sum(dim=1).mean() for name in student]
    return sum(losses[1:], losses[0]) / len(losses)
