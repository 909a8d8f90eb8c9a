"""Implant every attack once: ACC, ASR, visibility of the trigger, training time. One JSON file a row, resuming.

    python benchmarks/attacks.py --root .data/cifar10                  # all rows
    python benchmarks/attacks.py --root .data/cifar10 --attacks wanet  # one row
    python benchmarks/attacks.py --table                               # the table of the rows that are there
    python benchmarks/attacks.py --root .data/cifar10 --gallery gallery.png

The attacks are those of ``configs/attack``, as they stand there. A clean model is trained first, alike but without an
attack. It is the surrogate of LC and TrojanNN, the measure of what an attack costs in ACC, and gives for every trigger
the ASR (floor) and RA (ceiling) of a model never poisoned with it. Backdoored models and attack states are kept under
``--work``; a row whose model is not there is trained again.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from common import (
    ATTACKS,
    BATCH_SIZE,
    CONFIGS,
    build,
    config,
    data,
    load,
    merged,
    network,
    network_spec,
    parser,
    provenance,
    quiet,
    run_cells,
    test,
    trainer,
)
from fitting import fit
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from nba_lightning import BackdoorDataModule, Classifier
from nba_lightning.app.figures import gallery_figure
from nba_lightning.attacks import SSBA, Attack
from nba_lightning.attacks.surrogate import SurrogateAttack
from nba_lightning.data import Source
from nba_lightning.io.weights import load_weights, save_weights


class Row(NamedTuple):
    """A backdoored model; ``clean`` is the one that nobody poisoned."""

    attack: str
    rate: float | None = None
    defense: str = "none"
    seed: int = 0

    @property
    def label(self) -> str:
        return self.attack if self.rate is None else f"{self.attack}-{self.rate:g}"


def implanted(args: argparse.Namespace, label: str) -> torch.nn.Module:
    """The backdoored (or clean) model that was trained."""
    model = network(args)
    load_weights(model, args.work / f"{label}.safetensors")
    return model


def attack_for(args: argparse.Namespace, name: str, **changes: Any) -> Attack:
    """The attack of a config; ``state=...`` for the very trigger that was implanted."""
    spec = merged(config("attack", name)["data"]["init_args"]["attack"], {"init_args": changes})
    attack: Attack = build(Attack, spec)
    return attack


def state_file(args: argparse.Namespace, label: str) -> str:
    return str(args.work / f"{label}.attack.safetensors")


def fresh_attack(args: argparse.Namespace, source: Source, row: Row) -> Attack:
    """The attack with the surrogate or encoder it needs first."""
    changes = {} if row.rate is None else {"poison_rate": row.rate}
    attack = attack_for(args, row.attack, **changes)
    if isinstance(attack, SurrogateAttack):
        surrogate = {"surrogate": network_spec(args), "surrogate_weights": str(args.work / "clean.safetensors")}
        return attack_for(args, row.attack, **changes, **surrogate)
    if isinstance(attack, SSBA):
        first = config("implant", "steganography")
        datamodule = data(args, source, attack, batch_size=BATCH_SIZE, train_on="untriggered")
        trainer(args, first["trainer"]["max_epochs"]).fit(build(pl.LightningModule, first["model"]), datamodule)
    return attack


def implant(args: argparse.Namespace, source: Source, row: Row) -> dict[str, Any]:
    """Train one model and give its row."""
    pl.seed_everything(row.seed, verbose=False)
    model, module, epochs = network(args), config("defense", "none")["model"], args.epochs
    attack = None if row.attack == "clean" else fresh_attack(args, source, row)
    if (CONFIGS / "implant" / f"{row.attack}.yaml").exists():
        module = config("implant", row.attack)["model"]
        epochs += module["init_args"].get("mask_epochs", 0)
    spec = merged(module, {"init_args": {"model": network_spec(args)}})
    implanting = build(Classifier, spec)
    implanting.model = model
    train_on = "untriggered" if attack is not None and attack.trained_with_classifier else "poisoned"
    datamodule = data(args, source, attack, batch_size=BATCH_SIZE, train_on=train_on, **own_data(row.attack))
    chosen = [spec, None if attack is None else config("attack", row.attack)]
    meter = fit(args, f"{row.label}-none-{row.seed}", implanting, datamodule, epochs, chosen)
    cell = {"attack": row.attack, "defense": "none", "seed": row.seed, **test(args, Classifier(model), datamodule)}
    if attack is not None:
        cell |= {"poison_rate": attack.poison_rate, **visibility(attack, source), **references(args, datamodule)}
        save_weights(attack.state_dict(), Path(state_file(args, row.label)))
    cell |= {"seconds": meter.seconds, "peak_memory_mib": meter.peak_memory_mib}
    cell |= {"settings": {"epochs": epochs, "batch_size": BATCH_SIZE}, **provenance(args)}
    save_weights(model.state_dict(), args.work / f"{row.label}.safetensors")
    return cell


def own_data(name: str) -> dict[str, Any]:
    """What an attack's config says of the poisoned training's data beside the attack."""
    if name == "clean":
        return {}
    return {key: value for key, value in config("attack", name)["data"]["init_args"].items() if key != "attack"}


def references(args: argparse.Namespace, datamodule: BackdoorDataModule) -> dict[str, Any]:
    """What the clean model shows, with and without the trigger."""
    figures = test(args, Classifier(implanted(args, "clean")), datamodule)
    return {"clean_acc": figures["acc"], "never_poisoned": figures}


def implant_all(args: argparse.Namespace, source: Source, rows: list[Row]) -> int:
    """Train the models that are missing, the clean one first; how many failed."""

    def trained(some: list[Row]) -> int:
        tasks = [(f"{row.label}-none-0", row) for row in some]
        # A result whose model is not on this machine serves no defence.
        gone = [name for name, row in tasks if not (args.work / f"{row.label}.safetensors").exists()]
        return run_cells(args, source, implant, tasks, again=gone)

    if trained([Row("clean")]):
        raise SystemExit("The clean model could not be trained; see clean-none-0.json.")
    return trained(rows)


@torch.no_grad()
def visibility(attack: Attack, source: Source, number: int = 2000) -> dict[str, float]:
    """PSNR (dB, of the squared error over all images) and SSIM of triggered test images."""
    _, images = source.load()
    attack.cpu()
    psnr = PeakSignalNoiseRatio(data_range=1.0)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
    for part in torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:number].split(500):
        clean = images.read(part).float() / 255
        triggered = attack(clean)
        psnr.update(triggered, clean)
        ssim.update(triggered, clean)
    return {"psnr": round(float(psnr.compute()), 2), "ssim": round(float(ssim.compute()), 4)}


def table(results: Path) -> str:
    """The rows that are there, as Markdown; percent."""
    lines = [
        "| attack | poison | ACC | ACC, clean model | ASR | floor (ASR) | ceiling (RA) | PSNR (dB) | SSIM | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in (results / f"{name}{rate}-none-0.json" for name in ATTACKS for rate in ("", "-0.01")):
        if not path.exists():
            continue
        row = json.loads(path.read_text())
        if "error" in row:
            lines.append(f"| {row['attack']} | failed: {row['error']} |")
            continue
        percent = [row["acc"], row["clean_acc"], row["asr"], row["never_poisoned"]["asr"], row["never_poisoned"]["ra"]]
        cells = [f"{100 * row['poison_rate']:g} %", *(f"{100 * value:.1f}" for value in percent)]
        cells += [f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {row['attack']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.no_grad()
def gallery(args: argparse.Namespace, source: Source) -> None:
    """Clean, triggered and magnified difference of one test image for every attack that was implanted."""
    _, images = source.load()
    shown = images.read(torch.tensor([args.image])).float() / 255
    triggered = {}
    for name in ATTACKS:
        if Path(state_file(args, name)).exists():
            attack = attack_for(args, name, state=state_file(args, name))
            attack.prepare(images.shape, int(images.labels.max()) + 1)
            triggered[name] = attack(shown)[0]
    gallery_figure(shown[0], triggered, args.gallery)
    print(f"{len(triggered)} attacks in {args.gallery}")


def main() -> None:
    quiet()
    options = parser(__doc__, "attacks")
    options.add_argument("--attacks", nargs="+", default=ATTACKS, choices=ATTACKS)
    options.add_argument("--poison-rate", type=float, help="another rate than the attack's own")
    options.add_argument("--table", action="store_true", help="print the table of what is there, train nothing")
    options.add_argument("--gallery", type=Path, help="draw all implanted attacks into this file, train nothing")
    options.add_argument("--image", type=int, default=1500, help="index of the gallery's test image")
    args = options.parse_args()
    if args.table:
        print(table(args.results))
        return
    source = load(args)
    if args.gallery:
        gallery(args, source)
        return
    failed = implant_all(args, source, [Row(name, args.poison_rate) for name in args.attacks])
    raise SystemExit(f"{failed} rows failed; their JSON says why." if failed else 0)


if __name__ == "__main__":
    main()
