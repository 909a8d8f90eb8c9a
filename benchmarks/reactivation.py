"""Is a backdoor gone, or asleep? ASR after an attacker fine-tunes a cleaned model with five poisoned images.

    python benchmarks/reactivation.py --root-cifar .data/cifar10                  # every cleaned model of settings.py
    python benchmarks/reactivation.py --root-cifar .data/cifar10 --only wrn_badnets --defenses nba nad --seeds 0
    python benchmarks/reactivation.py --root-cifar .data/cifar10 --only wrn_badnets --weights cleaned.safetensors
                                      --state attack.safetensors --never-poisoned clean.safetensors
    python benchmarks/reactivation.py --figure reactivation.png                   # of what is there; runs nothing
    python benchmarks/report.py --settings                                        # one more column

The attacker has 2 % of the training images, drawn class by class, and five others, not of the target class, with the
trigger of tests and his label. He fine-tunes all weights on them for 5 epochs by SGD at 0.01 (momentum 0.9, no decay,
no schedule). Beside every model stands the same on the one that was never poisoned: what five images implant anew.

Source: the retuning attack of Min et al., "Uncovering, explaining, and mitigating the superficial safety of backdoor
defense", NeurIPS 2024 (arXiv 2410.09838), with the settings of the authors' code; there the five replace clean images.
"""

import argparse
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import BATCH_SIZE, HERE, cells, done, plain_parser, provenance, quiet, run_cells, test, trainer
from implanting import SETTINGS, Setting, attack_of, images, read_setting
from reactivation_report import NEVER, figure
from settings import Cell, each, found_models, loaded, source_of, within
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from nba_lightning import BackdoorDataModule, Classifier
from nba_lightning.attacks import Attack
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.randomness import shuffled
from nba_lightning.data import Source
from nba_lightning.data.dataset import LabeledImages, MemoryImages
from nba_lightning.data.partition import stratified_split

POISONED, SHARE, EPOCHS, LR = 5, 0.02, 5, 0.01
CHOSEN = {"poisoned_images": POISONED, "clean_share": SHARE, "epochs": EPOCHS, "lr": LR}


class AttackersImages(Source):
    """Few clean images of another source, and fewer with the trigger and the attacker's labels.

    Args:
        source: the other one, whose test set stays.
        attack: the attack, ready to trigger.
        share: of the training images that stay clean, class by class.
        poisoned: how many others carry the trigger; none of a class that is its own target.
        seed: of the draw.

    Raises:
        ValueError: if so many images are not left.
    """

    def __init__(self, source: Source, attack: Attack, share: float, poisoned: int, seed: int) -> None:
        train, self._test = source.load()
        self.classes = source.check(train, self._test)
        others, self.kept = stratified_split(train.labels, share, seed)
        able = others[attack.relabel(train.labels[others]) != train.labels[others]]
        if len(able) < poisoned:
            raise ValueError(f"Expected {poisoned} images to poison beside {len(self.kept)}, but got {len(able)}.")
        self.chosen = able[shuffled(len(able), seed, 30)][:poisoned]
        with torch.no_grad():
            triggered = attack.cpu()(train.read(self.chosen).float() / 255)
        pixels = torch.cat([train.read(self.kept), triggered.mul(255).round().to(torch.uint8)])
        labels = torch.cat([train.labels[self.kept], attack.relabel(train.labels[self.chosen])])
        self._train = MemoryImages(pixels, labels)

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        return self._train, self._test


def ready(datamodule: BackdoorDataModule) -> Attack:
    """The attack of images, able to trigger."""
    datamodule.setup()
    datamodule.test_dataloader()  # computes what an attack without a state has to compute
    assert datamodule.attack is not None
    return datamodule.attack


def reactivated(
    args: argparse.Namespace, setting: Setting, source: Source, weights: Path, state: Path | None, seed: int
) -> dict[str, float]:
    """ACC, ASR and RA of a model after the attacker fine-tuned it.

    Args:
        args: what :func:`common.parser` gives.
        setting: its network, augmentation and attack are used.
        source: the images.
        weights: file with the model's weights.
        state: file with the attack's state; ``None`` where it is a function of its arguments.
        seed: of the attacker's draw, and of order and augmentation.
    """
    pl.seed_everything(seed, verbose=False)
    evaluation = images(setting, source, attack_of(setting, **({} if state is None else {"state": str(state)})))
    own = AttackersImages(source, ready(evaluation), SHARE, POISONED, seed)
    return test(args, woken(args, setting, own, weights, evaluation.augment, seed), evaluation)


def woken(
    args: argparse.Namespace, setting: Setting, own: Source, weights: Path, augment: RandomCropFlip | None, seed: int
) -> Classifier:
    """The model after the attacker fine-tuned it on his own images."""
    number = len(own.load()[0])
    batch_size = number // -(-number // BATCH_SIZE)  # as many batches as whole ones would be; hardly an image is left
    part: dict[str, Any] = {"clean_fraction": 1.0, "validation_fraction": 0.0, "order_seed": seed}
    datamodule = BackdoorDataModule(own, None, augment=augment, batch_size=batch_size, **part)
    module = Classifier(
        loaded(setting, weights),
        optimizer=functools.partial(SGD, lr=LR, momentum=0.9),
        scheduler=functools.partial(ConstantLR, factor=1.0),
        seed=seed,
    )
    trainer(args, EPOCHS).fit(module, datamodule)
    return module


def work(args: argparse.Namespace, source: Source, cell: Cell) -> dict[str, Any]:
    """Re-activate one model of a setting."""
    weights, state = files(args, cell)
    figures = reactivated(args, args.setting, source, weights, state, cell.seed)
    result = {"setting": cell.setting, "defense": cell.defense, "seed": cell.seed, **figures}
    return result | {"settings": CHOSEN, "weights": mark(weights), **provenance(args)}


def files(args: argparse.Namespace, cell: Cell) -> tuple[Path, Path | None]:
    """Weights of a cell, and the attack's state."""
    if args.weights is not None:
        return (args.weights if cell.defense != NEVER else args.never_poisoned), args.state
    found = found_models(args, cell.setting)
    cleaned = args.work / "cleaned" / f"{cell.name}.safetensors"
    return found.clean if cell.defense == NEVER else cleaned, found.attack


def mark(weights: Path) -> str:
    """What tells whether a file is the one that a result was made with."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def outdated(args: argparse.Namespace, cell: Cell) -> bool:
    """Whether a result is there, of other weights or settings than today's."""
    path, (weights, _) = args.results / f"{cell.name}.json", files(args, cell)
    if not done(path) or not weights.exists():
        return False
    found = json.loads(path.read_text())
    return bool((found["weights"], found["settings"]) != (mark(weights), CHOSEN))


def tasks_of(args: argparse.Namespace, name: str) -> list[Cell]:
    """The cleaned models of a setting that are to be looked at, and for each seed the one that was never poisoned."""
    if args.weights is not None:
        given = [args.weights.stem] + ([NEVER] if args.never_poisoned is not None else [])
        return [Cell(name, label, seed) for seed in args.seeds or [0] for label in given]
    found = [
        Cell(name, cell["defense"], cell["seed"])
        for cell in cells(args.settings_results)
        if cell.get("setting") == name and "error" not in cell and cell["defense"] != "none"
    ]
    found = [cell for cell in found if not args.seeds or cell.seed in args.seeds]
    found = [cell for cell in found if not args.defenses or cell.defense.split("@")[0] in args.defenses]
    return [Cell(name, NEVER, seed) for seed in sorted({cell.seed for cell in found})] + found


def run(args: argparse.Namespace, name: str) -> int:
    """All models of one setting; how many failed."""
    setting = read_setting(args, name)
    tasks = tasks_of(args, setting["name"])
    if not tasks:
        return 0
    here = within(args, setting)
    again = [cell.name for cell in tasks if outdated(here, cell)]
    source = source_of(json.dumps(setting["source"]))
    return run_cells(here, source, work, [(cell.name, cell) for cell in tasks], again)


def parsed() -> argparse.Namespace:
    options = plain_parser(__doc__, "reactivation")
    for folder in ("cifar", "photos", "fashion"):
        options.add_argument(f"--root-{folder}", type=Path, help="as for settings.py")
    options.add_argument("--strangers", type=Path, help="as for settings.py")
    options.add_argument("--settings-results", type=Path, default=HERE / "results" / "settings", help="their cells")
    options.add_argument("--only", nargs="+", default=SETTINGS, help="these settings, by name or as a file of your own")
    options.add_argument("--defenses", nargs="+", help="these defences; by default all that were run")
    options.add_argument("--seeds", nargs="+", type=int, help="these seeds; by default all that were run")
    options.add_argument("--weights", type=Path, help="one model of yours instead, of the network of one setting")
    options.add_argument("--state", type=Path, help="the state of its attack, where it has one")
    options.add_argument("--never-poisoned", type=Path, help="a model to compare it with")
    options.add_argument("--figure", type=Path, help="draw what is there into this file, run nothing")
    args = options.parse_args()
    if args.weights is not None and len(args.only) != 1:
        options.error("--weights belongs to one setting: name it by --only")
    return args


def main() -> None:
    quiet()
    args = parsed()
    if args.figure is not None:
        figure(list(cells(args.settings_results)), list(cells(args.results)), args.figure)
        return
    each(args, run, "models")


if __name__ == "__main__":
    main()
