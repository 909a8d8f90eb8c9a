"""The report's pictures, as data URIs: pseudo samples and attention, whose files the report names."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nba_lightning.app.report_reading import NETWORKS, Entry, read_json
from nba_lightning.core.checks import expected
from nba_lightning.io.files import read_tensor_file

SHOWN = 12
"""Samples that are shown at most."""
_SIDE = 192  # longest side in pixels, so that a report stays small enough for a letter
_Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Answer:
    """What a network says to an image."""

    network: str
    label: str
    probability: float | None
    right: bool


@dataclass(frozen=True)
class Picture:
    """An image, what it shows in words, and the words beneath it."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """Pictures of one image and what the networks say to it."""

    label: str
    note: str
    pictures: list[Picture]
    answers: list[Answer]


def pseudo_samples(folder: Path, names: Sequence[str]) -> list[Sample]:
    """The strongest pseudo samples; none if there is no file of them."""
    if not (folder / "pseudo.safetensors").exists():
        return []
    tensors, entries, _ = _read(folder, "pseudo", ("images", "perturbed"))
    clean, changed = _as_pixels(tensors["images"], "images"), _as_pixels(tensors["perturbed"], "perturbed")
    if tensors["images"].shape != tensors["perturbed"].shape:
        raise expected("perturbed", "of the shape of `images`", tuple(tensors["perturbed"].shape))
    return [_pseudo(*one, names) for one in zip(clean, changed, entries, strict=True)]


def _pseudo(clean: _Pixels, changed: _Pixels, entry: Entry, names: Sequence[str]) -> Sample:
    label = entry.label("class", names)
    change = changed.astype(np.float64) - clean
    gain = 127 / max(float(np.abs(change).max()), 1.0)
    magnified = np.rint(np.clip(127.5 + gain * change, 0, 255)).astype(np.uint8)
    target = f"searched for class {entry.label('target', names)}" if entry.values.get("target") is not None else ""
    times = f"{gain:.1f}" if gain < 10 else f"{gain:.0f}"
    pictures = [
        Picture(_uri(clean), f"An image of class {label}, unchanged", "image"),
        Picture(_uri(changed), f"The image of class {label} with the perturbation", "perturbed"),
        Picture(
            _uri(magnified),
            f"The change, {times} times magnified; grey is none",
            f"change \u00d7{times}",
        ),
    ]
    note = ", ".join(part for part in (target, entry.text("source") or "") if part)
    return Sample(label, note, pictures, _answers(entry, label, names))


def attention_samples(folder: Path, names: Sequence[str]) -> tuple[list[Sample], str]:
    """Attention of the networks on the same images, and the layer; none if there is no file of it."""
    if not (folder / "attention.safetensors").exists():
        return [], ""
    tensors, entries, layer = _read(folder, "attention", ("images", "suspicious", "cleaned"))
    images = _as_pixels(tensors["images"], "images")
    maps = {name: _as_maps(tensors[name], name, len(images)) for name in NETWORKS if name in tensors}
    samples = []
    for i, (image, entry) in enumerate(zip(images, entries, strict=True)):
        label = entry.label("class", names)
        pictures = [Picture(_uri(image), f"An image of class {label}", "image")]
        for name, found in maps.items():
            alt = f"Attention on the image of class {label}"
            pictures.append(Picture(_uri(_overlaid(image, found[i])), alt, name))
        samples.append(Sample(label, entry.text("caption") or "", pictures, _answers(entry, label, names)))
    return samples, layer


def _read(folder: Path, stem: str, needed: Sequence[str]) -> tuple[dict[str, Tensor], list[Entry], str]:
    """The tensors and entries of the first samples, and the layer's name."""
    content = read_tensor_file(folder / f"{stem}.safetensors", stem)
    root = read_json(folder / f"{stem}.json", f"report/{stem}.json")
    entries = root.children("samples")
    for name in needed:
        if not isinstance(content.get(name), Tensor):
            raise expected(f"{stem}.safetensors", f"one with {' and '.join(needed)}", f"one without {name}")
        if len(content[name]) != len(entries):
            got = f"{len(content[name])} {name} and {len(entries)} samples"
            raise expected(f"{stem}.safetensors", f"of as many samples as {stem}.json", got)
    return {name: value[:SHOWN] for name, value in content.items()}, entries[:SHOWN], root.text("layer") or ""


def _answers(entry: Entry, label: str, names: Sequence[str]) -> list[Answer]:
    found = [(name, answer) for name in NETWORKS if (answer := entry.child(name)) is not None]
    return [
        Answer(name, said := answer.label("class", names), answer.number("probability", 0.0, 1.0), said == label)
        for name, answer in found
    ]


def _as_pixels(images: Tensor, name: str) -> list[_Pixels]:
    """Images `(N, C, H, W)` uint8 as a list of `(H, W)` or `(H, W, 3)`."""
    if images.ndim != 4 or str(images.dtype) != "torch.uint8" or images.shape[1] not in (1, 3):
        got = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
        raise expected(name, "uint8 of shape (N, 1 or 3, H, W)", got)
    pixels = images.permute(0, 2, 3, 1).numpy()
    return list(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _as_maps(maps: Tensor, name: str, count: int) -> NDArray[Any]:
    """Maps `(N, h, w)`, each relative to its largest value."""
    if maps.ndim != 3 or not maps.is_floating_point() or len(maps) != count:
        got = f"{str(maps.dtype).removeprefix('torch.')} of shape {tuple(maps.shape)}"
        raise expected(name, f"floating-point attention of shape ({count}, h, w)", got)
    values: NDArray[Any] = maps.float().numpy()
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise expected(name, "finite attention of at least 0", f"values from {values.min():g} to {values.max():g}")
    relative: NDArray[Any] = values / np.maximum(values.max(axis=(1, 2), keepdims=True), 1e-12)
    return relative


def _overlaid(image: _Pixels, heat: NDArray[Any]) -> _Pixels:
    """Attention `(h, w)` in [0, 1] over the image in grey: dark and clear where it is 0, bright where it is 1."""
    grey = Image.fromarray(image).convert("L")
    longest = max(grey.size)
    factor = _SIDE // longest if longest <= _SIDE else _SIDE / longest  # whole pixels of small images
    size = (max(1, round(grey.width * factor)), max(1, round(grey.height * factor)))
    base = np.asarray(grey.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS))
    smooth = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))[..., None]
    colors = mpl.colormaps["inferno"](smooth[..., 0])[..., :3] * 255
    opacity = 0.25 + 0.6 * smooth
    mixed: _Pixels = np.rint((1 - opacity) * base[..., None] + opacity * colors).astype(np.uint8)
    return mixed


def _uri(pixels: _Pixels) -> str:
    """A PNG of small images, as they are; a JPEG of large ones, smaller."""
    picture, stream = Image.fromarray(pixels), io.BytesIO()
    small = max(pixels.shape[:2]) <= 64
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    if small:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=92, subsampling=0)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(stream.getvalue()).decode()}"
