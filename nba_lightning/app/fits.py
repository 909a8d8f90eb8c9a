"""The fits of the chain: how long each is, where it saves itself, and on which devices it runs."""

import copy
import math
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from nba_lightning.app.chain import Chain, say
from nba_lightning.app.pictures import save_pictures
from nba_lightning.callbacks import CleanedWeights, Guard, History
from nba_lightning.data.owner import CleanImages
from nba_lightning.defenses import NBA
from nba_lightning.io.checkpoints import SafeCheckpointIO
from nba_lightning.training import Defense
from nba_lightning.training.sweep import STUDENT_SHARE, teachers_loss, usual_optimizer
from nba_lightning.training.verification import Verification

TEACHER_STEPS, STUDENT_STEPS = 450, 450
_LEAST_EPOCHS = 5
_SAVE_EVERY = timedelta(minutes=1)
_CAME_BACK = (
    "To lose no more clean accuracy than `max_loss`, {:.0f} % of what tells the backdoor came back, and about as much "
    "of the backdoor may have. A larger `max_loss` leaves less of it."
)
_CURVE = 20
"""Points of a fit's curve, about."""


@dataclass(frozen=True)
class Places:
    """Where a chain computes.

    Attributes:
        accelerator: of the Trainer.
        devices: processes on this machine.
        nodes: machines.
    """

    accelerator: str
    devices: int
    nodes: int

    @staticmethod
    def of(device: str) -> "Places":
        """One device; under ``torchrun`` and ``srun`` as many as they started processes for."""
        accelerator = "cuda" if device == "gpu" else device
        local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
        if local and world:
            return Places(accelerator, int(local), max(1, int(world) // int(local)))
        tasks, nodes = int(os.environ.get("SLURM_NTASKS", "1")), int(os.environ.get("SLURM_NNODES", "1"))
        if tasks > 1 and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            return Places(accelerator, max(1, tasks // nodes), nodes)
        return Places(accelerator, 1, 1)

    def trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer at these places."""
        strategy = "ddp" if self.devices * self.nodes > 1 else "auto"
        return pl.Trainer(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.nodes,
            strategy=strategy,
            logger=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=[SafeCheckpointIO()],
            **kwargs,
        )

    def device(self) -> torch.device:
        """The device of this process."""
        return self.trainer(enable_progress_bar=False, enable_checkpointing=False).strategy.root_device


@dataclass
class Link:
    """One fit that saves itself in a folder and goes on from there.

    Attributes:
        name: what it is called.
        folder: for its checkpoints.
        places: where it runs.
        data: the clean images.
        steps: optimiser steps that are asked for.
        max_loss: of the guard.
        seed: of what no part seeds itself.
        bar: whether it shows a progress bar.
    """

    name: str
    folder: Path
    places: Places
    data: CleanImages
    steps: int
    max_loss: float
    seed: int
    bar: bool

    @property
    def batch(self) -> int:
        """Images of a step, of all processes."""
        processes = self.places.devices * self.places.nodes
        return processes * self.data.batch_size_for(processes)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return max(1, len(self.data.training) // self.batch)

    @property
    def epochs(self) -> int:
        """As many as the steps need."""
        return max(_LEAST_EPOCHS, math.ceil(self.steps / self.steps_per_epoch))

    def cost(self) -> str:
        """What the fit will cost, before it starts."""
        steps = self.epochs * self.steps_per_epoch
        return f"{steps:,} steps of {self.batch} images, {self.epochs:,} passes over {len(self.data.training):,} images"

    def fit(self, module: Defense, to: Path) -> dict[str, Any]:
        """Fit, and say what came of it; the weights are in ``to`` or, rejected, in ``rejected.safetensors`` beside it.

        Returns:
            ``verdict`` and ``sentence`` of the guard, ``file``, ``curve`` and what was chosen.
        """
        for old in to.parent.glob("rejected*.safetensors"):
            old.unlink(missing_ok=True)  # of a rate that was too strong, or of this fit before it was interrupted
        guard = Guard(self.max_loss, teacher_max_loss=teachers_loss(self.max_loss), advise=False)
        history, weights = History(), CleanedWeights(str(to))
        every = max(1, self.epochs // _CURVE)
        saver = ModelCheckpoint(
            self.folder, save_last=True, save_top_k=0, train_time_interval=_SAVE_EVERY, enable_version_counter=False
        )
        callbacks: list[Callback] = [guard, history, weights, saver]
        runner = self.places.trainer(
            max_epochs=self.epochs,
            check_val_every_n_epoch=every,
            enable_progress_bar=self.bar,
            callbacks=callbacks,
            default_root_dir=self.folder,
        )
        last = self.folder / "last.ckpt"
        with isolate_rng():
            pl.seed_everything(self.seed, verbose=False)
            runner.fit(module, self.data, ckpt_path=last if last.is_file() else None, weights_only=True)
        if weights.written is None and runner.is_global_zero:
            raise RuntimeError(f"The fit of the {self.name} ended without weights.")
        curve = [{"fit": self.name, "epoch": every * (i + 1), **row} for i, row in enumerate(history.epochs)]
        written = to if guard.verdict != "rejected" else to.with_stem("rejected")
        return {
            "verdict": guard.verdict,
            "sentence": guard.sentence,
            "accuracies": {role: vars(found) for role, found in guard.accuracies.items()},
            "file": written.name,
            "curve": curve,
            "chosen": self._chosen(module, runner),
        }

    def _chosen(self, module: Defense, runner: pl.Trainer) -> dict[str, Any]:
        optimizer = runner.optimizers[0] if runner.optimizers else None
        group = optimizer.param_groups[0] if optimizer is not None else {}
        of_suspicious: dict[str, Any] = {}
        if isinstance(verification := getattr(module, "verification", None), Verification):
            of_suspicious = {"accepted": float(torch.as_tensor(module.accepted)), "verified": verification.sentence}
            if verification.suspected:
                of_suspicious["suspected"] = [self.data.classes[number] for number in verification.suspected]
        return {
            "optimiser": type(optimizer).__name__,
            "rate": float(group.get("initial_lr", group.get("lr", module.lr))),
            "steps": int(runner.global_step),
            "batch": self.batch,
            "layers": [name.removeprefix("network.") for name in module.observed_layers()],  # as the owner knows them
            **of_suspicious,
        }


def optimizer_for(network: nn.Module, rate: float) -> dict[str, Any]:
    """A defence's arguments for the network's usual optimiser at a rate."""
    if usual_optimizer(network) == "SGD":
        return {"lr": rate}
    return {"optimizer": partial(torch.optim.AdamW, lr=rate), "warmup": 0.05}


def fit_student(
    network: nn.Module, teacher: nn.Module, rate: float, whole: bool, link: Link, chain: Chain, seed: int, show: bool
) -> dict[str, Any]:
    """Align a copy of the network with the teacher at a share of its rate; keep pictures of what it was aligned on.

    With ``whole`` all of it may be kept where no class is suspected.
    """

    def work() -> dict[str, Any]:
        module = NBA(
            copy.deepcopy(network),
            teacher=teacher,
            verification=Verification(max_loss=link.max_loss, whole=whole),
            seed=seed,
            **optimizer_for(network, STUDENT_SHARE * rate),
        )
        verifying = module.verification.passes_of_images(link.data.num_classes, len(link.data.training))
        say(f"  {link.cost()}; to verify it at most {verifying:,} passes of an image", show)
        found = link.fit(module, chain.folder / "cleaned.safetensors")
        warnings = save_pictures(chain.folder / "report", module, network, link.data)
        if module.verification.came_back:
            warnings.append(_CAME_BACK.format(100 * module.verification.came_back))
        return {**found, "to_unlearn": module.verification.to_unlearn, "warnings": warnings}

    found: dict[str, Any] = chain.step(link.name, work)
    shutil.rmtree(link.folder, ignore_errors=True)
    return found
