"""What distilling defences share: a student that trains and a teacher that is given."""

import copy
from typing import Any

from torch import nn

from nba_lightning.core.checks import expected
from nba_lightning.core.modes import Frozen, fingerprint
from nba_lightning.io.weights import load_weights
from nba_lightning.training.defense import Defense


class Distillation(Defense):
    """Base class of defences with a student, which starts from the suspicious weights, and a frozen teacher.

    The teacher is made by a fit of its own, by any defence; fine-tuning is the usual one. A subclass writes its
    ``training_step`` and says by :attr:`needs_teacher` whether its terms ask the teacher.

    Args:
        model: the suspicious network, the student.
        weights: a file with its suspicious weights; ``None`` if ``model`` has them already.
        teacher: the teacher: a network, or the defence that made it. It is copied and stays as it is.
        teacher_weights: a file with the weights of a teacher of the student's architecture, instead of ``teacher``.
        lr: initial learning rate.
        warmup: share of the steps over which the learning rate rises linearly.
        **kwargs: further arguments of :class:`~nba_lightning.training.classifier.Classifier`.

    Raises:
        ValueError: if both ``teacher`` and ``teacher_weights`` are given; at the ``setup`` of a fit, if no teacher is,
            or if it has the suspicious network's own weights.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str | None = None,
        teacher: nn.Module | None = None,
        teacher_weights: str | None = None,
        lr: float = 0.1,
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if {"teacher_epochs", "teacher_lr"} & kwargs.keys():  # of version 0.1
            raise ValueError(self._how_to_make_a_teacher("`teacher_epochs`"))
        super().__init__(model, weights, lr=lr, warmup=warmup, **kwargs)
        self.teacher = self._given("teacher", teacher, teacher_weights)

    def _given(self, name: str, network: nn.Module | None, weights: str | None) -> Frozen | None:
        """A copy of a network, of what a defence made, or of the model with weights of a file; ``None`` for neither.

        Args:
            name: of the argument.
            network: the network, or the defence.
            weights: the file.

        Raises:
            ValueError: if both are given.
        """
        if network is not None and weights is not None:
            raise expected(f"{name}_weights", f"left out where `{name}` is given", weights)
        if weights is not None:
            network = copy.deepcopy(self.model)
            load_weights(network, weights)
        return None if network is None else Frozen(network.model if isinstance(network, Defense) else network)

    def _begin_with(self, name: str, whose: str, network: nn.Module) -> None:
        """Give the model the weights of a network of ``whose`` architecture, which was given as ``name``."""
        own, other = self.model.state_dict(), network.state_dict()
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in other.items()}:
            raise expected(name, f"of {whose} architecture", type(network).__name__)
        self.model.load_state_dict(other)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term asks the teacher."""
        return True

    def teacher_network(self) -> nn.Module:
        """The teacher.

        Raises:
            ValueError: if none was given, with what to do.
        """
        if self.teacher is None:
            raise ValueError(self._how_to_make_a_teacher("None"))
        return self.teacher.network

    def _how_to_make_a_teacher(self, got: str) -> str:
        name = type(self).__name__
        return (
            f"Expected `teacher` to be given for {name}, but got {got}. Make one by a fit of its own, in Python\n"
            "    teacher = FineTuning(copy.deepcopy(network))\n"
            f"    Trainer(max_epochs=10).fit(teacher, clean_loader)  # then {name}(network, teacher=teacher)\n"
            "or on the command line\n"
            "    nba-lightning fit ... --config fine_tuning --checkpoint.dirpath runs/teacher\n"
            f"    nba-lightning fit ... --config {name.lower()} "
            "--model.teacher_weights runs/teacher/cleaned.safetensors"
        )

    def setup(self, stage: str) -> None:
        """As usual; a fit needs a teacher that differs from the suspicious network."""
        if stage == "fit" and self.needs_teacher and fingerprint(self.teacher_network()) == fingerprint(self.model):
            raise expected(
                "teacher",
                "another network than the student (fine-tune a copy: `copy.deepcopy(network)`)",
                "one with the same weights",
            )
        super().setup(stage)
