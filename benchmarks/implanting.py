"""The models of a setting: the suspicious one, the one that nobody poisoned, and the attack with its trigger."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import yaml
from common import BATCH_SIZE, HERE, build, config, merged, poisoned_training, trainer
from extra_sources import smooth_picture
from fitting import fit, fit_key
from torch import nn

from nba_lightning import BackdoorDataModule, Classifier
from nba_lightning.attacks import SSBA, Attack
from nba_lightning.attacks.surrogate import SurrogateAttack
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.data import Source
from nba_lightning.io.weights import read_state_dict, save_weights

SETTINGS = sorted(path.stem for path in (HERE / "settings").glob("*.yaml"))
Setting = Mapping[str, Any]


class Models(NamedTuple):
    """Files of weights, and of the attack's state (``None`` where it is a function of its arguments)."""

    clean: Path
    poisoned: Path
    attack: Path | None


def read_setting(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A file of ``benchmarks/settings`` or another, where ``$CIFAR`` and the like are folders of the command line."""
    path = Path(name) if name.endswith(".yaml") else HERE / "settings" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"Expected `--only` to name a YAML file or one of {', '.join(SETTINGS)}, but got {name!r}.")
    text = path.read_text()
    folders = {"CIFAR": args.root_cifar, "PHOTOS": args.root_photos, "FASHION": args.root_fashion}
    folders |= {"STRANGERS": args.strangers, "WORK": args.work}
    for key, folder in folders.items():
        if f"${key}" in text and folder is None:
            option = "strangers" if key == "STRANGERS" else f"root-{key.lower()}"
            raise ValueError(f"Expected `--{option}` to be given for the setting {name!r}, but got None.")
        text = text.replace(f"${key}", str(folder))
    found: dict[str, Any] = yaml.safe_load(text)
    return {"name": path.stem, **found}


def images(setting: Setting, source: Source, attack: Attack | None, **changes: Any) -> BackdoorDataModule:
    """The images of a setting, all split alike."""
    total = len(source.load()[0])
    augment = None if setting["augment"] is None else RandomCropFlip(**setting["augment"])
    own: dict[str, Any] = {"augment": augment, "batch_size": BATCH_SIZE}
    own |= {"clean_fraction": setting["clean_images"] / total, "validation_fraction": setting["validation_fraction"]}
    return BackdoorDataModule(source, attack, **own | changes)


def attack_of(setting: Setting, **changes: Any) -> Attack:
    """The attack: a config with the setting's arguments; ``state=...`` for the very trigger that was implanted."""
    spec = config("attack", setting["attack"]["config"])["data"]["init_args"]["attack"]
    own = setting["attack"].get("init_args", {}) | changes
    attack: Attack = build(Attack, merged(spec, {"init_args": own}))
    return attack


def models(args: argparse.Namespace, setting: Setting, source: Source) -> Models:
    """Find or make the models of a setting; those of ``--models`` come first."""
    if "picture.png" in str(setting["attack"]):
        smooth_picture(args.work / "picture.png")
    given = setting.get("models", {})
    files = {part: None if args.models is None else args.models / f"{name}.safetensors" for part, name in given.items()}
    there = {part: file for part, file in files.items() if file is not None and file.exists()}
    clean = there.get("clean") or made(args, setting, source, "clean", None, None)
    if "poisoned" in there:
        state = there["poisoned"].with_suffix(".attack.safetensors")
        return Models(clean, there["poisoned"], state if state.exists() else None)
    if setting["implanting"]["poisoned"].get("epochs") == 0:
        return Models(clean, clean, None)  # nobody poisoned it
    if "weights" in setting["implanting"]["poisoned"]:
        return Models(clean, made(args, setting, source, "poisoned", None, None), None)
    attack = ready_attack(args, setting, source, clean)
    start = clean if setting["implanting"]["poisoned"].get("from") == "clean" else None
    poisoned = made(args, setting, source, "poisoned", attack, start)
    return Models(clean, poisoned, poisoned.with_suffix(".attack.safetensors"))


def ready_attack(args: argparse.Namespace, setting: Setting, source: Source, clean: Path) -> Attack:
    """The attack with the surrogate or encoder that it needs first."""
    attack = attack_of(setting)
    if isinstance(attack, SurrogateAttack):
        return attack_of(setting, surrogate=setting["network"], surrogate_weights=str(clean))
    if isinstance(attack, SSBA):
        first = config("implant", "steganography")
        encoding = trainer(args, first["trainer"]["max_epochs"])
        encoding.fit(build(pl.LightningModule, first["model"]), images(setting, source, attack, train_on="untriggered"))
    return attack


def made(
    args: argparse.Namespace, setting: Setting, source: Source, part: str, attack: Attack | None, start: Path | None
) -> Path:
    """Weights of one stage of ``implanting``: a stranger's, or trained as it says, unless they are there."""
    stage = setting["implanting"][part]
    pl.seed_everything(0, verbose=False)
    if "weights" in stage:
        return converted(args, setting, part)
    name = None if attack is None else setting["attack"]["config"]
    module_spec, train_on, more = poisoned_training(name, stage.get("implant"))
    epochs = stage["epochs"] + more
    changes: dict[str, Any] = {"batch_size": stage.get("batch_size", BATCH_SIZE), "train_on": train_on}
    own_data = config("attack", setting["attack"]["config"])["data"]["init_args"]
    if attack is not None and "augment" in own_data:
        changes["augment"] = own_data["augment"]
    own = {**stage.get("init_args", {}), "model": setting["network"]}
    module: Classifier = build(Classifier, merged(module_spec, {"init_args": own}))
    if start is not None:
        module.model.load_state_dict(read_state_dict(start))
    module.model.to(memory_format=torch.channels_last)
    datamodule = images(setting, source, attack, **changes)
    datamodule.setup()
    settings = [stage, None if attack is None else setting["attack"], epochs]
    key = fit_key(args, module, datamodule, settings)
    path = args.work / "models" / f"{part}-{key}.safetensors"
    if not path.exists():
        fit(args, f"{setting['name']}-{part}", module, datamodule, epochs, settings)
        if attack is not None:
            save_weights(attack.state_dict(), path.with_suffix(".attack.safetensors"))
        partial = path.with_suffix(".partial")
        save_weights(module.model.state_dict(), partial)
        partial.replace(path)
    return path


def converted(args: argparse.Namespace, setting: Setting, part: str) -> Path:
    """A stranger's state dict under the network's own names, as ``keys`` (regular expressions) translate them."""
    implanting = setting["implanting"]
    network: nn.Module = build(nn.Module, setting["network"])
    state = {}
    for theirs, value in read_state_dict(implanting[part]["weights"]).items():
        name = theirs
        for pattern, replacement in implanting.get("keys", {}).items():
            name = re.sub(pattern, replacement, name)
        state[name] = value
    own = {name: value for name, value in network.state_dict().items() if name.startswith("normalize.")}
    network.load_state_dict({**own, **state})
    path: Path = args.work / "models" / f"{setting['name']}-{part}.safetensors"
    save_weights(network.state_dict(), path)
    return path
