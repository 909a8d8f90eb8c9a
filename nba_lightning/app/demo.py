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
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nba_lightning import NBA, Classifier, FineTuning
from nba_lightning.app import figures
from nba_lightning.attacks import Attack, BadNets, Blended
from nba_lightning.callbacks import CleanedWeights, History
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.features import features
from nba_lightning.core.functional import attention_map, defense_effectiveness_rating
from nba_lightning.core.randomness import generator_for
from nba_lightning.data import BackdoorDataModule, Digits
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import TriggerFamilies

_ATTACKS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended}
_IMPLANT_EPOCHS, _TEACHER_EPOCHS, _STUDENT_EPOCHS, _LR = 20, 120, 40, 0.1


def demo(output: str = "nba-demo", seed: int = 0, attack: Literal["badnets", "blended"] = "badnets") -> None:
    """Implant a backdoor into a small network on scikit-learn's digits, then remove it with 5 % clean images.

    Args:
        output: folder for ``results.json``, the figures and ``cleaned.safetensors``.
        seed: seed of everything.
        attack: the attack to implant.
    """
    start, console, folder = time.perf_counter(), Console(), Path(output)
    links = folder / f"{attack}-{seed}"  # where each fit saves itself, so that a demo that was interrupted goes on
    links.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(seed, verbose=False)
    watches = [History() for _ in range(3)]
    with _quiet():
        console.rule(f"1/4  The attacker trains a network on digits, 10 % poisoned by {_ATTACKS[attack].__name__}")
        data = _data(_ATTACKS[attack](), "poisoned", seed)
        backdoored = Classifier(SmallCNN(in_channels=1), seed=seed)
        _fit(backdoored, data, _IMPLANT_EPOCHS, links / "implant", watches[0])
        console.rule("2/4  The owner, who knows neither trigger nor target, fine-tunes a copy of it: the teacher")
        clean_data = _data(_ATTACKS[attack](), "clean", seed)
        teacher = FineTuning(copy.deepcopy(backdoored.model), pseudo=TriggerFamilies(), lr=_LR, seed=seed)
        _fit(teacher, clean_data, _TEACHER_EPOCHS, links / "teacher", watches[1])
        console.rule("3/4  The owner aligns the network with the teacher")
        nba = NBA(copy.deepcopy(backdoored.model), teacher=teacher, lr=_LR / 3, seed=seed)
        to = CleanedWeights(str(folder / "cleaned.safetensors"))
        _fit(nba, clean_data, _STUDENT_EPOCHS, links / "student", watches[2], to)
        console.rule("4/4  Test")
        networks = {"backdoored": backdoored.model, "fine-tuned": teacher.model, "nba": nba.model}
        rows = _rows({name: _test(network, clean_data, folder) for name, network in networks.items()})
    _draw(folder, clean_data, nba, backdoored.model, [watch.epochs for watch in watches])
    seconds = time.perf_counter() - start
    provenance = {"attack": attack, "seed": seed, "versions": _versions(), "seconds": round(seconds, 1)}
    (folder / "results.json").write_text(json.dumps([row | provenance for row in rows], indent=1) + "\n")
    console.print(_table(rows, attack))
    console.print(f"{seconds:.0f} seconds. Figures, results.json and cleaned.safetensors are in {folder}/")


def _fit(module: Classifier, data: BackdoorDataModule, epochs: int, folder: Path, *callbacks: Callback) -> None:
    """One link of the chain; it goes on from its last save, if there is one."""
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
    last = folder / "last.ckpt"
    runner = _trainer(epochs, folder, saver, *callbacks)
    runner.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)


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
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
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
    assert labels is not None
    assert attack is not None
    chosen = (attack.relabel(labels) != labels).nonzero().flatten()[:8]
    clean = images[chosen].float() / 255
    triggered = attack(clean)
    perturbations = nba.pseudo(clean, nba.model, nba.teacher_network(), generator_for(0))
    figures.samples_figure(clean, triggered, (clean + perturbations).clamp(0, 1), folder / "samples.png")
    fits = ("implanting the backdoor", "fine-tuning the teacher", "aligning the student")
    figures.curves_figure(dict(zip(fits, histories, strict=True)), folder / "curves.png")
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
