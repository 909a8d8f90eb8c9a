"""What every attack is: a trigger, a relabelling and a share of the training set."""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_image_batch, check_range, expected, is_plain
from nba_lightning.io.attack_state import attack_name, different_arguments, pack, read_attack_state, unpack

CLEAN, POISONED, CROSS = 0, 1, 2
"""Roles of training images: as they are; triggered and relabelled; changed, but with their true label."""


class TrainingImages(Protocol):
    """What an attack may look at before it starts; see :meth:`Attack.compute`."""

    labels: Tensor

    def read(self, indices: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, uint8, at ``indices`` `(B,)`."""


class Attack(nn.Module, ABC):
    """Base class of all attacks.

    A subclass writes :meth:`apply_trigger` and, where it needs them, :meth:`build` (masks and patterns from the image
    size alone), :meth:`compute` (what depends on the training images) and :meth:`apply_cross` (images that carry a
    false trigger and keep their label). The base checks arguments, keeps images in [0, 1], relabels and says who may
    be poisoned. What was drawn, computed or learned is the attack's state (persistent buffers and parameters): it
    travels in the checkpoint of a training, with the arguments. What follows from the arguments alone is built anew, so
    a state is taken over under the same arguments only.

    Args:
        target: the class that the attacker wants (all-to-one).
        poison_rate: triggered images as a share of the *whole* training set, in [0, 1), for every attack. A
            clean-label attack can reach at most the share that its target class has.
        all_to_all: label y becomes (y + 1) mod K instead of ``target``.
        state: a checkpoint of an earlier training (``.ckpt``) or a state dict of the same attack; its trigger is taken
            over to the last bit. Other arguments must be as they were, but for those in ``free_arguments`` and seeds.

    Raises:
        ValueError: for a rate outside its range, or ``all_to_all`` where the attack has no such form.
        FileNotFoundError: if ``state`` is no file.
    """

    allows_all_to_all: ClassVar[bool] = True
    cross_ratio: float = 0.0
    """Cross images (false trigger, true label) for each triggered one."""
    free_arguments: ClassVar[frozenset[str]] = frozenset(
        {"poison_rate", "cross_ratio", "state", "surrogate", "surrogate_weights"}
    )
    """Arguments that may differ from those of a ``state``, beside seeds: they choose images to train on, or only had a
    part in finding what the state holds. A subclass adds its own."""
    clean_label: bool = False
    """Whether only images of the target class are poisoned, so that no label changes."""

    def __init__(
        self, target: int = 0, poison_rate: float = 0.1, all_to_all: bool = False, state: str | None = None
    ) -> None:
        super().__init__()
        check_at_least("target", target, 0)
        check_range("poison_rate", poison_rate, 0.0, 1.0, open_high=True)
        if all_to_all and not self.allows_all_to_all:
            raise ValueError(
                f"Expected `all_to_all` to be false for {type(self).__name__}, which has one target only, but got true."
            )
        if state is not None and not Path(state).is_file():
            raise FileNotFoundError(f"Expected `state` to be an existing file, but got {state!r}.")
        self.target, self.poison_rate, self.all_to_all, self.state = target, poison_rate, all_to_all, state
        self.num_classes: int | None = None
        self.image_shape: tuple[int, int, int] | None = None
        self.ready = False

    @property
    def needs_compute(self) -> bool:
        """Whether the attack has something to compute or learn before it can trigger images."""
        return False

    def prepare(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Fit the attack to the data: check the target and build masks and patterns. Safe to call again.

        Args:
            image_shape: `(C, H, W)` of one image.
            num_classes: number of classes K.

        Raises:
            ValueError: if the target class does not exist, the trigger does not fit the images or ``state`` does not
                fit the attack.
        """
        if num_classes < 2:
            raise expected("num_classes", "at least 2", num_classes)
        if not self.all_to_all and self.target >= num_classes:
            raise expected("target", f"one of the {num_classes} classes 0 to {num_classes - 1}", self.target)
        self.num_classes = num_classes
        if self.image_shape != image_shape:
            self.image_shape = image_shape
            self.build(image_shape)
            self.ready = not self.needs_compute
            if self.state is not None:
                self.restore(read_attack_state(self.state))

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Build buffers for images of shape `(C, H, W)`. Nothing to do by default."""

    def compute(self, images: TrainingImages, training: Tensor, poisoned: Tensor, device: torch.device) -> None:
        """Compute once what depends on the training images, then set ``ready``. Nothing to do by default.

        Args:
            images: the training set.
            training: `(N_t,)` indices of the images that the attacker has; the defender's validation part is not his.
            poisoned: `(N_p,)` indices of the images that will be poisoned.
            device: where to compute.
        """

    def bases(self) -> Tensor | None:
        """Images `(N_p, C, H, W)`, uint8, that replace the poisoned ones before they are triggered; mostly none."""
        return None

    @abstractmethod
    def apply_trigger(self, images: Tensor) -> Tensor:
        """Put the trigger on a batch; clamping is done by the base.

        Args:
            images: `(B, C, H, W)`, float, values in [0, 1].

        Returns:
            `(B, C, H, W)`, a new tensor.
        """

    def apply_cross(self, images: Tensor, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Put a false trigger on some images of a batch, for attacks with a ``cross_ratio``.

        Args:
            images: `(B, C, H, W)`, float, values in [0, 1], the whole batch.
            rows: `(M,)` int64, which of them get it.
            generator: source of randomness, on the images' device.

        Returns:
            `(M, C, H, W)`, a new tensor; clamping is done by the base.
        """
        raise NotImplementedError(f"{type(self).__name__} has no cross images.")

    def forward(self, images: Tensor) -> Tensor:
        """Put the trigger on a batch.

        Args:
            images: `(B, C, H, W)`, float, values in [0, 1].

        Returns:
            `(B, C, H, W)`, values in [0, 1]. The input is left as it is.
        """
        self._check(images)
        return self.apply_trigger(images).clamp_(0.0, 1.0)

    def poison(
        self,
        images: Tensor,
        labels: Tensor,
        roles: Tensor,
        generator: torch.Generator | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A training batch as the attacker makes it; only the images that carry a trigger are worked on.

        Args:
            images: `(B, C, H, W)`, float, values in [0, 1].
            labels: `(B,)` true classes.
            roles: `(B,)`, each ``CLEAN``, ``POISONED`` or ``CROSS``; on the host, so that nothing waits for the device.
            generator: source of the cross images' randomness.
            places: `(B,)` the how-manieth of the attacker's images each one is (see
                :class:`~nba_lightning.io.batches.Batch`), for attacks that do something else to each.

        Returns:
            Images and labels of the same shapes.
        """
        self._check(images)
        changed, rows = images, rows_of(roles == POISONED, images.device)
        if len(rows):
            changed = changed.index_copy(0, rows, self(images[rows]).to(images))
        cross = rows_of(roles == CROSS, images.device) if self.cross_ratio > 0 else rows[:0]
        if len(cross):
            false = self.apply_cross(images, cross, generator).clamp_(0.0, 1.0)
            changed = changed.index_copy(0, cross, false.to(images))
        return changed, labels.index_copy(0, rows, self.relabel(labels[rows]))

    def relabel(self, labels: Tensor) -> Tensor:
        """The attacker's labels `(B,)` for true labels `(B,)`."""
        if not self.all_to_all:
            return torch.full_like(labels, self.target)
        if self.num_classes is None:
            raise RuntimeError(f"Call {type(self).__name__}.prepare(image_shape, num_classes) before relabelling.")
        return (labels + 1) % self.num_classes

    def eligible(self, labels: Tensor) -> Tensor:
        """Which training images may be poisoned, `(N,)` bool: all whose label changes, or the target class."""
        return labels == self.target if self.clean_label else self.relabel(labels) != labels

    def _check(self, images: Tensor) -> None:
        check_image_batch("images", images)
        if self.image_shape is None:
            raise RuntimeError(
                f"Call {type(self).__name__}.prepare(image_shape, num_classes) before triggering images."
            )
        if tuple(images.shape[1:]) != self.image_shape:
            raise expected("images", f"of shape {('B', *self.image_shape)}", tuple(images.shape))
        if not self.ready:
            raise RuntimeError(f"Call {type(self).__name__}.compute(...) before triggering images.")

    def arguments(self) -> dict[str, Any]:
        """The plain arguments that make the trigger and the labels, by name: what must agree with a state.

        Those that the attack keeps in an attribute of the same name; any other cannot be compared.
        """
        names = {name for name in _constructor_arguments(type(self)) if not name.endswith("_seed")}
        found = {name: getattr(self, name) for name in sorted(names - self.free_arguments) if hasattr(self, name)}
        return {name: value for name, value in found.items() if is_plain(value)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of an earlier attack of the same class, arguments and image shape.

        Arguments are refused where they differ rather than taken over: the reader of a configuration must be able to
        trust it. Seeds and ``free_arguments`` may differ.

        Raises:
            ValueError: if it is another attack's, was made under other arguments, or its tensors do not fit.
        """
        name = type(self).__name__
        if attack_name(state) != name:
            raise expected("state", f"of a {name}", f"that of a {attack_name(state)}")
        different = different_arguments(state, self.arguments())
        if different is None:
            warnings.warn(
                f"This state of a {name} was written before states carried their attack's arguments, so nothing can "
                "tell whether target, pattern and the like are as they were.",
                stacklevel=2,
            )
        elif different:
            raise expected("state", f"of a {name} with the same arguments", f"one with {', '.join(different)}")
        try:
            self.load_state_dict(dict(state))
        except RuntimeError as error:
            raise expected("state", f"of a {name} with the same arguments and image shape", error) from error

    def get_extra_state(self) -> Tensor:
        """Class name, arguments and whether the attack is ready; see :mod:`nba_lightning.io.attack_state`."""
        return pack(type(self).__name__, self.ready, self.arguments())

    def set_extra_state(self, state: Tensor) -> None:
        """Take over whether the attack is ready."""
        self.ready = unpack(state)["ready"]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name, buffer in self._buffers.items():  # an empty buffer waits for what is computed, of any length
            saved = state_dict.get(prefix + name)
            if saved is not None and buffer is not None and buffer.numel() == 0:
                self._buffers[name] = torch.empty_like(saved, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def rows_of(chosen: Tensor, device: torch.device) -> Tensor:
    """Indices `(M,)`, on the device, of the true values of `(B,)`, found where these are."""
    return chosen.nonzero().flatten().to(device, non_blocking=True)


def _constructor_arguments(attack: type[Attack]) -> Iterator[str]:
    """Names of the arguments of a class and, where it passes on ``**kwargs``, of its bases."""
    for base in attack.__mro__:
        if issubclass(base, Attack) and "__init__" in vars(base):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            yield from (parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return
