"""The owner's commands: ``clean`` and ``scan``."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from nba_lightning.app.answers import ask, check_order
from nba_lightning.app.chain import check_folder, say, write_json
from nba_lightning.app.clean import clean
from nba_lightning.app.errors import CommandError, UsageError
from nba_lightning.app.fits import STUDENT_STEPS, TEACHER_STEPS, Places
from nba_lightning.app.networks import count_classes, load_network
from nba_lightning.app.scans import run_scans, scan_cost
from nba_lightning.core.checks import expected
from nba_lightning.data.owner import CleanImages

REJECTED = 3
"""Exit status of a cleaning whose network lost too much."""


def clean_command(
    network: str,
    images: str,
    weights: str | None = None,
    output: str = "cleaned",
    classes: list[str] | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    image_size: int | None = None,
    channels: int = 3,
    held_out: float | None = None,
    batch_size: int | None = None,
    max_images: int = 20_000,
    flip: bool = True,
    padding: int | None = None,
    num_workers: int = 2,
    max_loss: float = 0.05,
    teacher_steps: int = TEACHER_STEPS,
    student_steps: int = STUDENT_STEPS,
    scan: bool = True,
    trust_classes: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    network_arguments: dict[str, Any] | None = None,
) -> int:
    """Clean a suspicious network with a folder of clean images, and report.

    Args:
        network: import path of its class or function, such as torchvision.models.resnet18, or mine.Network of a file
            mine.py in this folder. Its arguments: --network.NAME VALUE.
        images: folder of clean images, DIR/<class>/*; all are used.
        weights: file with its weights (.pth, .safetensors, Lightning's .ckpt).
        output: folder for the results; the same command goes on with a run that was interrupted.
        classes: names of the class folders in the order of the network's outputs, as [cat,dog], or a file with a name
            a line. Default: alphabetical.
        mean: of the normalisation that it was trained with, as [0.485,0.456,0.406]; [0], with std [1], for a network
            of images in [0, 1].
        std: likewise.
        image_size: resize images to this height and width.
        channels: 3 for colour, 1 for grey.
        held_out: share of the images that is held out to measure accuracy. Default: a fifth, none of fewer than 50.
        batch_size: images per step.
        max_images: of more images as many are drawn.
        flip: mirror images in training; false for letters, digits and signs.
        padding: largest shift in training, in pixels.
        num_workers: processes that read images which do not fit into memory.
        max_loss: clean accuracy that may be lost; a network that lost more is rejected (exit status 3).
        teacher_steps: steps of each teacher that is tried.
        student_steps: steps of the alignment.
        scan: scan before and after.
        trust_classes: go on though the network is right on fewer than half of the images.
        seed: of everything.
        device: auto, cpu, cuda or mps.
        progress: say what happens.
        network_arguments: those of --network.NAME VALUE, as a dictionary.

    Returns:
        The exit status.
    """
    check_folder(Path(output))
    found = load_network(network, weights, network_arguments, mean, std)
    data = CleanImages(
        images,
        classes,
        image_size,
        channels,
        held_out,
        batch_size,
        max_images=max_images,
        padding=padding,
        flip=flip,
        num_workers=num_workers,
        seed=seed,
    )
    try:
        report = clean(
            found,
            data,
            output,
            max_loss=max_loss,
            teacher_steps=teacher_steps,
            student_steps=student_steps,
            scan=scan,
            trust_classes=trust_classes,
            seed=seed,
            device=device,
            progress=progress,
            described={"network": network, "arguments": network_arguments or {}},
        )
    except KeyboardInterrupt as interrupt:
        raise CommandError(_kept(Path(output)), 130) from interrupt
    return 0 if report["weights"]["handed_over"] else REJECTED


def scan_command(
    network: str,
    weights: str | None = None,
    images: str | None = None,
    output: str = "scanned",
    classes: list[str] | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    image_size: int | None = None,
    channels: int = 3,
    max_images: int = 1000,
    trust_classes: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    network_arguments: dict[str, Any] | None = None,
) -> None:
    """Look whether a class of a network is reached unusually easily.

    Args:
        network: import path of its class or function. Its arguments: --network.NAME VALUE.
        weights: file with its weights.
        images: folder of clean images, DIR/<class>/*; without it only what needs none is done, for --image_size.
        output: folder for scan.json.
        classes: names of the classes in the order of the network's outputs, as [cat,dog], or a file with a name a line.
        mean: of the normalisation that it was trained with; [0], with std [1], for one of images in [0, 1].
        std: likewise.
        image_size: resize images to this height and width.
        channels: 3 for colour, 1 for grey.
        max_images: of more images as many are drawn.
        trust_classes: go on though the network is right on fewer than half of the images.
        seed: of everything.
        device: auto, cpu, cuda or mps.
        progress: show bars.
        network_arguments: those of --network.NAME VALUE, as a dictionary.
    """
    folder = Path(output)
    check_folder(folder)
    if (folder / "scan.json").exists() or (folder / "state.json").exists():
        raise expected("output", "a folder without another run's results", repr(output))
    found, where = load_network(network, weights, network_arguments, mean, std), Places.of(device).device()
    data: CleanImages | None = None
    if images is None:
        if image_size is None:
            raise expected("image_size", "given where there are no `images`", None)
        shape = (channels, image_size, image_size)
        names = [str(label) for label in range(count_classes(found, shape))] if classes is None else classes
        if len(names) != count_classes(found, shape):
            raise expected("classes", f"the names of the network's {count_classes(found, shape)} classes", len(names))
    else:
        data = CleanImages(images, classes, image_size, channels, 0.0, 2, max_images=max_images, seed=seed)
        data.setup()
        data.name_further_classes(count_classes(found, data.image_shape))
        shape, names = data.image_shape, data.classes
        if not trust_classes:
            warning = check_order(ask(found, data, False, where), names, len(names))
            say(f"Note: {warning}", warning is not None)
    number = 0 if data is None else len(data.training)
    say(f"Scanning: {scan_cost(len(names), number)}", progress)
    try:
        result = run_scans(found, names, where, data, shape, seed, progress)
    except KeyboardInterrupt as interrupt:
        raise CommandError("Interrupted; a scan keeps nothing.", 130) from interrupt
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "scan.json", {**result, "names": names, "seed": seed})
    for method, sentence in result["verdict"].items():
        say(f"{method}: {sentence}")
    for warning in result["warnings"]:
        say(f"Note: {warning}")
    say(f"A scan that finds nothing proves nothing; a class may be easy by nature. {folder / 'scan.json'}")


def prepare(arguments: list[str]) -> list[str]:
    """The commands' arguments for the parser: ``--network.NAME VALUE`` as one dictionary, names with underscores."""
    rest: list[str] = []
    given: dict[str, Any] = {}
    items = iter(arguments)
    for item in items:
        if not item.startswith("--"):
            rest.append(item)
            continue
        option, equals, value = item.partition("=")
        option = option.replace("-", "_").replace("__", "--", 1)
        if match := re.fullmatch(r"--network\.(\w+)", option):
            given[match[1]] = yaml.safe_load(value if equals else _next(items, item))
        elif option == "--classes":
            rest += [option, json.dumps(_names(value if equals else _next(items, item)))]
        else:
            rest.append(f"{option}{equals}{value}")
    return rest + (["--network_arguments", json.dumps(given)] if given else [])


def _next(items: Any, option: str) -> str:
    try:
        return str(next(items))
    except StopIteration:
        raise UsageError(f"Expected a value after {option}.") from None


def _names(text: str) -> list[str]:
    """``[cat,dog]`` or a file with a name a line; always text, though YAML would read ``no`` and ``1`` otherwise."""
    if not text.startswith("[") and Path(text).is_file():
        return [line.strip() for line in Path(text).read_text().splitlines() if line.strip()]
    return [name.strip().strip("'\"") for name in text.strip().removeprefix("[").removesuffix("]").split(",")]


def _kept(folder: Path) -> str:
    """What an interrupted run leaves, in a sentence."""
    names = sorted(path.name for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    if not names:
        return "Interrupted before the first step was done; nothing was kept."
    return f"Interrupted. Kept are {', '.join(names)} in {folder}; the same command goes on from there."
