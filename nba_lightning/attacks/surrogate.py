"""Attacks that consult a network of their own before they start."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nba_lightning.attacks.base import Attack, TrainingImages
from nba_lightning.core.randomness import shuffled
from nba_lightning.io.adapters import check_fit
from nba_lightning.io.weights import load_weights


class SurrogateAttack(Attack):
    """Base class of attacks that compute something with a network that the attacker trained beforehand.

    The surrogate is any classifier of the same images: train it with ``nba-lightning fit`` and
    ``configs/attack/none.yaml``, then name its checkpoint. It is no part of the attack's state.

    Args:
        surrogate: the network, images in [0, 1] to logits; a copy is used.
        surrogate_weights: a file with its weights; ``None`` if ``surrogate`` has them already.
        **kwargs: see :class:`~nba_lightning.attacks.base.Attack`.

    Raises:
        ValueError: if weights are named without a network or do not fit it; when prepared, if the surrogate is missing
            or does not fit the data.
    """

    def __init__(self, surrogate: nn.Module | None = None, surrogate_weights: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # In a tuple, so that it is not registered as a submodule.
        self._surrogate = (frozen_surrogate(surrogate, surrogate_weights, "surrogate"),)

    @property
    def surrogate(self) -> nn.Module | None:
        """The surrogate, frozen and in ``eval`` mode."""
        return self._surrogate[0]

    def prepare(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """As usual, and check that the surrogate fits the data."""
        if self.surrogate is not None:
            check_fit(self.surrogate, image_shape, num_classes, "surrogate")
        super().prepare(image_shape, num_classes)

    def need_surrogate(self, device: torch.device) -> nn.Module:
        """The surrogate on ``device``, or an error that says how to get one."""
        if self.surrogate is None:
            raise ValueError(
                f"Expected `surrogate` to be a trained network for {type(self).__name__}, but got None. Train one with "
                "`nba-lightning fit` and configs/attack/none.yaml, then name its checkpoint as `surrogate_weights`; "
                "or name the checkpoint of an earlier training with this attack as `state`."
            )
        return self.surrogate.to(device)


def frozen_surrogate(network: nn.Module | None, weights: str | None, name: str) -> nn.Module | None:
    """A copy of a network, frozen and in ``eval`` mode, with weights from a file if one is named.

    Args:
        network: the network; ``None`` gives ``None``.
        weights: a file with its weights; ``None`` if it has them already.
        name: of the argument, for errors.

    Raises:
        ValueError: if weights are named without a network, or do not fit it.
        FileNotFoundError: if there is no such file.
    """
    if network is None:
        if weights is not None:
            raise ValueError(f"Expected `{name}` to be a network where `{name}_weights` is given, but got None.")
        return None
    found = copy.deepcopy(network).eval().requires_grad_(False)
    if weights is not None:
        try:
            load_weights(found, weights)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace("`weights`", f"`{name}_weights`")) from error
    return found


def input_gradient(loss: Tensor, images: Tensor) -> Tensor:
    """Gradient of a scalar with respect to ``images``, float32."""
    return torch.autograd.grad(loss, images)[0].float()


def endless_batches(
    images: TrainingImages, training: Tensor, size: int, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """All of the attacker's images, again and again in another order.

    Args:
        images: where they are read.
        training: `(N,)` their indices.
        size: images of a batch; the last one of a pass has what is left.
        seed: of the orders.
        device: where they are wanted.

    Yields:
        `(B, C, H, W)`, float, values in [0, 1].
    """
    for passes in itertools.count():
        for part in torch.split(training[shuffled(len(training), seed, passes)], size):
            yield images.read(part).to(device).float() / 255
