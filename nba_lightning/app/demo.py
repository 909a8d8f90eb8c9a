"""The demo: poison and clean a small network on real digits, show what happened."""

import copy
import json
import logging
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning
import lightning.pytorch as pl
import torch
import torchvision
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nba_lightning import NBA, Classifier
from nba_lightning.app import figures
from nba_lightning.attacks import Attack, BadNets, Blended
from nba_lightning.callbacks import History
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.features import features
from nba_lightning.core.functional import attention_map, defense_effectiveness_rating
from nba_lightning.core.randomness import generator_for
from nba_lightning.data import BackdoorDataModule, Digits
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import UniversalPerturbations

_ATTACKS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended}
_IMPLANT_EPOCHS, _TEACHER_EPOCHS, _STUDENT_EPOCHS = 20, 30, 60


def demo(output: str = "nba-demo", seed: int = 0, attack: Literal["badnets", "blended"] = "badnets") -> None:
    """Implant a backdoor into a small network on scikit-learn's digits, then remove it with 5 % clean images.

    Args:
        output: folder for ``results.json``, the figures and ``cleaned.safetensors``.
        seed: seed of everything.
        attack: the attack to implant.
    """
    start, console, folder = time.perf_counter(), Console(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(seed, verbose=False)
    with _quiet():
        console.rule(f"1/3  The attacker trains a network on digits, 10 % poisoned by {_ATTACKS[attack].__name__}")
        data, watch = _data(_ATTACKS[attack](), "poisoned", seed), History()
        backdoored = Classifier(SmallCNN(in_channels=1), seed=seed)
        _trainer(_IMPLANT_EPOCHS, folder, watch).fit(backdoored, data)
        console.rule(
            "2/3  The owner, who knows neither trigger nor target, fine-tunes a teacher and aligns the network"
        )
        clean_data, clean_watch = _data(_ATTACKS[attack](), "clean", seed), History()
        nba = NBA(
            copy.deepcopy(backdoored.model),
            teacher_epochs=_TEACHER_EPOCHS,
            lr=0.05,
            distillation=1.0,
            mixed_distillation=4.0,
            seed=seed,
            pseudo=UniversalPerturbations(number=4, rms=0.3),
        )
        _trainer(_TEACHER_EPOCHS + _STUDENT_EPOCHS, folder, clean_watch).fit(nba, clean_data)
        console.rule("3/3  Test")
        networks = {"backdoored": backdoored.model, "fine-tuned": nba.teacher, "nba": nba.model}
        rows = _rows({name: _test(network, clean_data, folder) for name, network in networks.items()})
    _draw(folder, clean_data, nba, backdoored.model, [watch.epochs, clean_watch.epochs])
    seconds = time.perf_counter() - start
    provenance = {"attack": attack, "seed": seed, "versions": _versions(), "seconds": round(seconds, 1)}
    (folder / "results.json").write_text(json.dumps([row | provenance for row in rows], indent=1) + "\n")
    console.print(_table(rows, attack))
    console.print(f"{seconds:.0f} seconds. Figures, results.json and cleaned.safetensors are in {folder}/")


def _data(attack: Attack, train_on: Literal["poisoned", "clean"], seed: int) -> BackdoorDataModule:
    return BackdoorDataModule(
        Digits(),
        attack,
        train_on=train_on,
        validation_fraction=0.0,
        validate_on="test",
        augment=RandomCropFlip(1, flip=False),
        batch_size=64 if train_on == "poisoned" else 8,
        seed=seed,
    )


def _trainer(epochs: int, folder: Path, *callbacks: Callback, bar: bool = True) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
        callbacks=[*callbacks, *([RichProgressBar()] if bar else [])],
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )


def _test(network: nn.Module, data: BackdoorDataModule, folder: Path) -> dict[str, float]:
    parts = _trainer(1, folder, bar=False).test(Classifier(network), data, verbose=False)
    return {name.removeprefix("test/"): value for part in parts for name, value in part.items()}


def _rows(figures_of: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    before = figures_of["backdoored"]
    return [
        {
            "model": name,
            **after,
            "der": defense_effectiveness_rating(before["acc"], before["asr"], after["acc"], after["asr"]),
        }
        for name, after in figures_of.items()
    ]


def _table(rows: list[dict[str, Any]], attack: str) -> Table:
    table = Table(title=f"{_ATTACKS[attack].__name__} on 8x8 digits, percent of test images")
    table.add_column("model")
    for name in ("ACC", "ASR", "RA", "DER"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["model"], *(f"{100 * row[name]:.1f}" for name in ("acc", "asr", "ra", "der")))
    table.caption = "ACC, RA, DER: higher is better. ASR: lower is better."
    return table


def _draw(
    folder: Path, data: BackdoorDataModule, nba: NBA, backdoored: nn.Module, histories: list[list[dict[str, float]]]
) -> None:
    attack = data.attack
    images, labels = next(iter(data.test_dataloader()[0]))
    assert attack is not None
    chosen = (attack.relabel(labels) != labels).nonzero().flatten()[:8]
    clean = images[chosen].float() / 255
    triggered = attack(clean)
    perturbations = nba.pseudo(clean, nba.model, nba.teacher, generator_for(0))
    figures.samples_figure(clean, triggered, (clean + perturbations).clamp(0, 1), folder / "samples.png")
    implanted, defended = histories
    phases = {
        "implanting the backdoor": implanted,
        "fine-tuning the teacher": defended[:_TEACHER_EPOCHS],
        "aligning the student": defended[_TEACHER_EPOCHS:],
    }
    figures.curves_figure(phases, folder / "curves.png")
    maps = {
        name: _attention(network, triggered[:1])
        for name, network in (("backdoored", backdoored), ("after NBA", nba.model))
    }
    figures.attention_figure(triggered[0], maps, folder / "attention.png")


@torch.no_grad()
def _attention(network: nn.Module, image: Tensor) -> tuple[str, dict[str, Tensor]]:
    network.eval()
    logits, observed = features(network, image, SmallCNN.feature_layers)
    maps = {name: attention_map(value).view(value.shape[2:]) for name, value in observed.items()}
    return str(int(logits.argmax())), maps


def _versions() -> dict[str, str]:
    versions = {module.__name__: str(module.__version__) for module in (torch, torchvision, lightning)}
    return {**versions, "python": platform.python_version()}


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
