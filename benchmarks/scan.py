"""How often do the scans alarm, and rightly? A population of small networks, clean and backdoored; one JSON file each.

    python benchmarks/scan.py --data fashion_mnist --root /usr/share/datasets/fashion-mnist --width 8
    python benchmarks/scan.py --data cifar10 --root .data/cifar10 --image-size 16 --images 20000
    python benchmarks/scan.py --report --figure benchmarks/results/scan.png     # tables and ROC of what is there
    python benchmarks/scan.py --null                                            # decision rules alone, no network

Every network is trained on its own draw of the training images, the backdoored ones with targets, poison rates and
seeds in turn. The owner holds some of these images, never a poisoned one, from which the teacher is fine-tuned. What is
there is not made again: networks lie under ``--work``, results under ``--results`` (delete a result to scan again).
The report takes the references of the conformal rule from clean networks with an even seed and judges all others.
"""

import argparse
import copy
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from common import build, config, merged, quiet, run_cells, trainer
from extra_sources import FashionMNIST
from scan_report import null, report
from torch import nn

from nba_lightning import BackdoorDataModule, Classifier, FineTuning
from nba_lightning.attacks import Attack
from nba_lightning.attacks.surrogate import SurrogateAttack
from nba_lightning.core.randomness import shuffled
from nba_lightning.data import Digits, ImageFolderSource, Source
from nba_lightning.data.dataset import LabeledImages, MemoryImages
from nba_lightning.io.weights import load_weights, save_weights
from nba_lightning.networks import SmallCNN
from nba_lightning.scan import ClassShift, MaximumMargin, Scan, TeacherDisagreement

ATTACKS = ("badnets", "blended", "sig", "wanet", "bpp", "lf", "refool", "lc", "trojannn", "ftrojan")
COLOUR_ONLY = ("ftrojan",)
RATES = {"relabelling": (0.1, 0.05, 0.02), "clean label": (0.08, 0.06, 0.04)}
EASIER = {"bpp": {"levels": 3, "negative_ratio": 0.0}}
"""Attacks are those of ``configs/attack``, but for what networks this small do not learn in so few epochs."""
BATCH_SIZE = 128


class Network(NamedTuple):
    """A network of the population; ``clean`` is an attack of rate 0."""

    data: str
    attack: str
    target: int | None
    poison_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.attack}-{self.seed}"


class Drawn(Source):
    """A draw of a source's training images, and some of its test images, the same in every draw."""

    def __init__(self, source: Source, number: int, test_number: int, seed: int) -> None:
        self.source, self.number, self.test_number, self.seed = source, number, test_number, seed

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        train, test = self.source.load()
        return _some(train, self.number, self.seed), _some(test, self.test_number, 0)


def _some(images: LabeledImages, number: int, seed: int) -> MemoryImages:
    chosen = shuffled(len(images), seed, 23)[:number]
    return MemoryImages(images.read(chosen), images.labels[chosen])


def surrogate(data: str) -> Network:
    """The network that LC and TrojanNN consult."""
    return Network(data, "clean", None, 0.0, 0)


def source_of(args: argparse.Namespace) -> Source:
    if args.data == "digits":
        return common.Loaded(Digits())
    folder = (
        FashionMNIST(args.root)
        if args.data == "fashion_mnist"
        else ImageFolderSource(args.root, image_size=args.image_size)
    )
    return common.Loaded(folder)


def population(args: argparse.Namespace, channels: int, classes: int) -> list[Network]:
    """The clean networks and ``args.each`` of every attack, with targets and rates in turn."""
    found = [Network(args.data, "clean", None, 0.0, seed) for seed in range(args.clean)]
    for attack in (name for name in args.attacks if channels == 3 or name not in COLOUR_ONLY):
        spec = config("attack", attack)["data"]["init_args"]["attack"]
        rates = RATES["clean label" if build(Attack, spec).clean_label else "relabelling"]
        for j in range(args.each):
            found.append(Network(args.data, attack, (ATTACKS.index(attack) + 3 * j) % classes, rates[j % 3], 1000 + j))
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that a result hangs on beside what :class:`Network` says."""
    names = ("width", "image_size", "images", "test_images", "epochs", "owner")
    names += ("teacher_epochs", "teacher_batch", "teacher_lr", "starts", "steps", "rms")
    return {**{name: getattr(args, name) for name in names}, "batch_size": BATCH_SIZE}


def file_of(args: argparse.Namespace, cell: Network, what: str) -> Path:
    """Where weights are kept: a name for each combination of all that they hang on."""
    spec = None if cell.attack == "clean" else config("attack", cell.attack)
    training = {name: value for name, value in settings(args).items() if name not in ("starts", "steps", "rms")}
    key = json.dumps([cell._asdict(), training, spec, EASIER.get(cell.attack)])
    return Path(args.work) / f"{cell.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.{what}.safetensors"


def attack_of(args: argparse.Namespace, cell: Network, network: dict[str, int]) -> Attack | None:
    """The attack; with the very trigger that was implanted, where there is one."""
    if cell.attack == "clean":
        return None
    spec = config("attack", cell.attack)["data"]["init_args"]["attack"]
    changes: dict[str, Any] = {"target": cell.target, "poison_rate": cell.poison_rate, **EASIER.get(cell.attack, {})}
    if file_of(args, cell, "attack").exists():
        changes["state"] = str(file_of(args, cell, "attack"))
    elif isinstance(build(Attack, spec), SurrogateAttack):
        changes["surrogate"] = {"class_path": "nba_lightning.networks.SmallCNN", "init_args": network}
        changes["surrogate_weights"] = str(file_of(args, surrogate(cell.data), "network"))
    attack: Attack = build(Attack, merged(spec, {"init_args": changes}))
    return attack


def fitted(args: argparse.Namespace, path: Path, module: Classifier, data: BackdoorDataModule, epochs: int) -> float:
    """Fit a module, unless its weights are there; seconds."""
    start = time.perf_counter()
    if path.exists():
        load_weights(module.model, path)
        return 0.0
    trainer(args, epochs, accelerator="cpu").fit(module, data)
    if data.attack is not None and data.train_on == "poisoned":  # before the network, whose file says that all is there
        save_weights(data.attack.state_dict(), Path(str(path).replace(".network.", ".attack.")))
    save_weights(module.model.state_dict(), path)
    return round(time.perf_counter() - start, 1)


def examine(args: argparse.Namespace, source: Source, cell: Network) -> dict[str, Any]:
    """Train a network and its teacher, scan it."""
    torch.manual_seed(cell.seed)
    drawn = common.Loaded(Drawn(source, args.images, args.test_images, cell.seed))
    train, _ = drawn.load()
    shape = {"width": args.width, "num_classes": int(train.labels.max()) + 1, "in_channels": train.shape[0]}
    network, attack = SmallCNN(**shape), attack_of(args, cell, shape)
    options = {"seed": cell.seed, "validation_fraction": 0.0, "clean_fraction": args.owner}
    data = BackdoorDataModule(drawn, attack, batch_size=BATCH_SIZE, **options)
    row: dict[str, Any] = cell._asdict()
    module = Classifier(network, seed=cell.seed)
    row["seconds"] = fitted(args, file_of(args, cell, "network"), module, data, args.epochs)
    row |= common.test(args, module, data)
    owner = BackdoorDataModule(drawn, attack, train_on="clean", batch_size=args.teacher_batch, **options)
    tuning = FineTuning(copy.deepcopy(network), lr=args.teacher_lr, seed=cell.seed)
    row["teacher_seconds"] = fitted(args, file_of(args, cell, "teacher"), tuning, owner, args.teacher_epochs)
    row["teacher"] = common.test(args, tuning, owner)
    owner.setup()
    images, labels = train.read(owner.partition.clean).float() / 255, train.labels[owner.partition.clean]
    found = [scan.scan(network, images, labels, progress=False) for scan in scans(args, tuning.model)]
    row["scans"] = {result.method: result.to_dict() for result in found}
    return row | {"settings": settings(args), "image_shape": list(train.shape), **common.provenance(args)}


def scans(args: argparse.Namespace, teacher: nn.Module) -> list[Scan]:
    return [
        MaximumMargin(starts=args.starts, steps=args.steps),
        ClassShift(),
        TeacherDisagreement(teacher, rms=args.rms, step_images=16, max_images=250),
    ]


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", default="fashion_mnist", help="fashion_mnist, digits, or a name of your own")
    options.add_argument("--root", help="Fashion-MNIST's files, or a folder with train/<class>/* and test/<class>/*")
    options.add_argument("--image-size", type=int, help="resize the images of folders")
    options.add_argument("--results", type=Path, default=common.HERE / "results" / "scan")
    options.add_argument("--work", type=Path, default=Path("runs/scan"), help="where networks are kept")
    options.add_argument("--attacks", nargs="+", default=ATTACKS, choices=ATTACKS)
    options.add_argument("--clean", type=int, default=40, help="clean networks")
    options.add_argument("--each", type=int, default=5, help="networks of every attack")
    options.add_argument("--images", type=int, default=10_000, help="training images of a network")
    options.add_argument("--test-images", type=int, default=2000)
    options.add_argument("--width", type=int, default=16, help="of the SmallCNN")
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--owner", type=float, default=0.05, help="share of the training images that the owner holds")
    options.add_argument("--teacher-epochs", type=int, default=10)
    options.add_argument("--teacher-batch", type=int, default=32)
    options.add_argument("--teacher-lr", type=float, default=0.1)
    options.add_argument("--starts", type=int, default=10, help="of the maximum margin, for each class")
    options.add_argument("--steps", type=int, default=60, help="of the maximum margin")
    options.add_argument("--rms", type=float, nargs="+", default=[0.036, 0.072], help="sizes of the perturbations")
    options.add_argument("--jobs", type=int, default=1, help="networks at the same time")
    options.add_argument("--report", action="store_true", help="print the tables of what is there, train nothing")
    options.add_argument("--level", type=float, default=0.05, help="nominal share of false alarms")
    options.add_argument("--figure", type=Path, help="with --report: draw the ROC curves")
    options.add_argument("--null", action="store_true", help="false alarms of decision rules without any network")
    found = options.parse_args()
    found.network, found.source, found.precision = f"SmallCNN({found.width})", found.data, "32-true"
    if found.data != "digits" and found.root is None and not (found.report or found.null):
        options.error("--root is needed for all --data but digits")
    return found


def refuse_other_settings(args: argparse.Namespace, cells: list[Network]) -> None:
    """Stop where a result is there that would not be made today."""
    other = []
    for cell in cells:
        path = args.results / f"{cell.name}.json"
        if common.done(path):
            row = json.loads(path.read_text())
            today = {**cell._asdict(), "settings": settings(args)}
            other += [cell.name] * any(row.get(name) != value for name, value in today.items())
    if other:
        raise SystemExit(f"Results of other settings are there; delete or rename them: {', '.join(other)}.")


def main() -> None:
    quiet()
    args = arguments()
    if args.null:
        print(null(args.level))
        return
    if args.report:
        print(report(args.results, args.level, args.figure))
        return
    source = source_of(args)
    train, _ = source.load()
    cells = population(args, train.shape[0], int(train.labels.max()) + 1)
    refuse_other_settings(args, cells)
    first = [surrogate(args.data)]
    failed = sum(
        run_cells(args, source, examine, [(cell.name, cell) for cell in some])
        for some in (first, [cell for cell in cells if cell not in first])
    )
    raise SystemExit(f"{failed} networks failed; their JSON says why." if failed else 0)


if __name__ == "__main__":
    main()
