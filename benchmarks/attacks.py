"""Implant every attack once: ACC, ASR, visibility of the trigger, training time. One JSON file a row, resuming.

    python benchmarks/attacks.py --root .data/cifar10                  # all rows
    python benchmarks/attacks.py --root .data/cifar10 --attacks wanet  # one row
    python benchmarks/attacks.py --table                               # the table of the rows that are there
    python benchmarks/attacks.py --root .data/cifar10 --gallery gallery.png

A clean model is trained first, alike but without an attack. It is the surrogate of LC and TrojanNN, the measure of what
an attack costs in ACC, and gives for every trigger the ASR (floor) and RA (ceiling) of a model never poisoned with it.
Backdoored models and attack states are kept under ``--work``.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import BATCH_SIZE, data, load, network, parser, provenance, test, trainer, write
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from nba_lightning import BackdoorDataModule, Classifier, InputAwareTraining, Steganography
from nba_lightning.attacks import (
    BPP,
    LC,
    LF,
    SIG,
    SSBA,
    Attack,
    BadNets,
    Blended,
    FTrojan,
    InputAware,
    Refool,
    TrojanNN,
    WaNet,
)
from nba_lightning.data import Source
from nba_lightning.figures import gallery_figure
from nba_lightning.weights import load_weights, save_weights

ATTACKS: dict[str, Callable[..., Attack]] = {
    "badnets": BadNets,
    "blended": Blended,
    "trojannn": TrojanNN,
    "lf": LF,
    "sig": SIG,
    "lc": LC,
    "wanet": WaNet,
    "input_aware": InputAware,
    "bpp": BPP,
    "ssba": SSBA,
    "refool": Refool,
    "ftrojan": FTrojan,
}
NEED_SURROGATE = ("trojannn", "lc")
MASK_EPOCHS, ENCODER_EPOCHS = 2, 2


def clean_model(args: argparse.Namespace, source: Source) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model that nobody poisoned, trained once."""
    weights, record = args.work / "clean.safetensors", args.results / "clean-none-0.json"
    model = network()
    if weights.exists() and record.exists():
        load_weights(model, weights)
        return model, json.loads(record.read_text())
    pl.seed_everything(0, verbose=False)
    model = network()
    module, datamodule = Classifier(model), data(source, None, batch_size=BATCH_SIZE)
    seconds = fit(args, module, datamodule, args.epochs)
    cell = {"attack": "clean", "defense": "none", "seed": 0, **test(args, module, datamodule), "seconds": seconds}
    cell |= {"settings": {"epochs": args.epochs, "batch_size": BATCH_SIZE}, **provenance(args)}
    save_weights(model.state_dict(), weights)
    write(record, cell)
    return model, cell


def fit(args: argparse.Namespace, module: pl.LightningModule, datamodule: BackdoorDataModule, epochs: int) -> float:
    start = time.perf_counter()
    trainer(args, epochs).fit(module, datamodule)
    return round(time.perf_counter() - start, 1)


def attack_for(args: argparse.Namespace, name: str) -> Attack:
    """The attack with the state it was implanted with."""
    return ATTACKS[name](state=str(args.work / f"{name}.attack.safetensors"))


def fresh_attack(args: argparse.Namespace, source: Source, name: str, **kwargs: Any) -> Attack:
    """The attack with the surrogate or encoder it needs first."""
    if name in NEED_SURROGATE:
        return ATTACKS[name](surrogate=clean_model(args, source)[0], **kwargs)
    if name == "ssba":
        attack = SSBA(**kwargs)
        seconds = fit(args, Steganography(), data(source, attack, batch_size=BATCH_SIZE), ENCODER_EPOCHS)
        print(f"ssba's encoder: {seconds} seconds", flush=True)
        return attack
    return ATTACKS[name](**kwargs)


def implant(args: argparse.Namespace, source: Source, name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The backdoored model and its row, trained once."""
    label = name if args.poison_rate is None else f"{name}-{args.poison_rate:g}"
    weights, record = args.work / f"{label}.safetensors", args.results / f"{label}-none-0.json"
    model = network()
    if weights.exists() and record.exists():
        load_weights(model, weights)
        return model, json.loads(record.read_text())
    clean, reference = clean_model(args, source)
    pl.seed_everything(0, verbose=False)
    model = network()
    attack = fresh_attack(args, source, name, **({} if args.poison_rate is None else {"poison_rate": args.poison_rate}))
    datamodule = data(source, attack, batch_size=BATCH_SIZE)
    joint = isinstance(attack, InputAware)
    module = InputAwareTraining(model, mask_epochs=MASK_EPOCHS) if joint else Classifier(model)
    seconds = fit(args, module, datamodule, args.epochs + MASK_EPOCHS * joint)
    cell = {"attack": name, "defense": "none", "seed": 0, "poison_rate": attack.poison_rate}
    cell |= {**test(args, Classifier(model), datamodule), **visibility(attack, source), "seconds": seconds}
    cell |= {"clean_acc": reference["acc"], "clean_seconds": reference["seconds"]}
    cell["never_poisoned"] = test(args, Classifier(clean), datamodule)
    cell |= {"settings": {"epochs": args.epochs, "batch_size": BATCH_SIZE}, **provenance(args)}
    save_weights(model.state_dict(), weights)
    save_weights(attack.state_dict(), args.work / f"{label}.attack.safetensors")
    write(record, cell)
    return model, cell


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
        state = args.work / f"{name}.attack.safetensors"
        if state.exists():
            attack = attack_for(args, name)
            attack.prepare(images.shape, int(images.labels.max()) + 1)
            triggered[name] = attack(shown)[0]
    gallery_figure(shown[0], triggered, args.gallery)
    print(f"{len(triggered)} attacks in {args.gallery}")


def main() -> None:
    warnings.filterwarnings("ignore")
    options = parser(__doc__, "attacks")
    options.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
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
    for name in args.attacks:
        implant(args, source, name)


if __name__ == "__main__":
    main()
