"""Figures of the demo and the benchmarks. Nothing here computes results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

_COLORS = {"acc": "#2a78b5", "asr": "#c8442f", "ra": "#3a9a5b"}
_NAMES = {"acc": "ACC (clean images)", "asr": "ASR (backdoor works)", "ra": "RA (triggered, right class)"}


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, dpi=150, bbox_inches="tight")


def _show(axes: Axes, image: Tensor, title: str | None = None) -> None:
    """Draw one image `(C, H, W)` in [0, 1], grey or RGB."""
    pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    if title is not None:
        axes.set_title(title, fontsize=10)


def samples_figure(clean: Tensor, triggered: Tensor, pseudo: Tensor, path: Path) -> None:
    """Clean, triggered and pseudo samples in three rows; `(n, C, H, W)` each, values in [0, 1]."""
    rows = {"clean": clean, "triggered\n(attacker)": triggered, "pseudo\n(NBA)": pseudo}
    count = len(clean)
    figure = Figure(figsize=(1.25 * count + 1, 4.3), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            _show(axes, image)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    figure.suptitle("What the attacker adds, and what NBA finds without seeing it")
    _save(figure, path)


def curves_figure(phases: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """ACC, ASR and RA in percent over the epochs of each phase, given as one dictionary per epoch."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    end = 0
    for title, epochs in phases.items():
        positions = range(end + 1, end + len(epochs) + 1)
        for name, color in _COLORS.items():
            values = [100 * epoch[name] for epoch in epochs]
            axes.plot(positions, values, color=color, lw=2, label=_NAMES[name] if end == 0 else None)
        axes.text(end + 0.5 + len(epochs) / 2, 104, title, ha="center", va="bottom", fontsize=10)
        end += len(epochs)
        axes.axvline(end + 0.5, color="#999999", lw=0.8, ls=":")
    axes.set(xlabel="epoch", ylabel="percent of test images", xlim=(0.5, end + 0.5), ylim=(-3, 103))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def attention_figure(image: Tensor, maps: Mapping[str, tuple[str, Mapping[str, Tensor]]], path: Path) -> None:
    """Attention maps of one triggered image, a row for each network.

    Args:
        image: `(C, H, W)`, values in [0, 1].
        maps: from the network's name to its answer and, for each layer, its attention `(h, w)`.
        path: the file.
    """
    layers = list(next(iter(maps.values()))[1])
    figure = Figure(figsize=(2 * (len(layers) + 1), 2.2 * len(maps)), layout="constrained")
    grid = figure.subplots(len(maps), len(layers) + 1, squeeze=False)
    for row, (line, (name, (answer, attention))) in enumerate(zip(grid, maps.items(), strict=True)):
        _show(line[0], image, "triggered image" if row == 0 else None)
        line[0].set_ylabel(f"{name}:\npredicts {answer}", rotation=0, ha="right", va="center", fontsize=10)
        for axes, layer in zip(line[1:], layers, strict=True):
            size = (image.shape[1], image.shape[2])
            heat = F.interpolate(attention[layer].float()[None, None].cpu(), size, mode="nearest")[0, 0]
            _show(axes, image)
            axes.imshow(heat.numpy(), cmap="inferno", alpha=0.75)
            if row == 0:
                axes.set_title(layer, fontsize=10)
    figure.suptitle("Where the network looks, before and after")
    _save(figure, path)


def gallery_figure(clean: Tensor, triggered: Mapping[str, Tensor], path: Path) -> None:
    """One image under many triggers: a column for each attack with the image and what was changed, magnified.

    Args:
        clean: `(C, H, W)`, values in [0, 1].
        triggered: from the attack's name to the triggered image, of the same shape.
        path: the file.
    """
    count = len(triggered) + 1
    columns = min(7, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.7 * columns + 0.6, 3.9 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    _show(grid[0, 0], clean, "clean")
    grid[0, 0].axis("on")
    for position, (name, image) in enumerate(triggered.items(), start=1):
        row, column = divmod(position, columns)
        change = image - clean
        gain = 0.5 / max(float(change.abs().max()), 1e-6)
        top, bottom = grid[2 * row, column], grid[2 * row + 1, column]
        for axes in (top, bottom):
            axes.axis("on")
        _show(top, image, name)
        _show(bottom, (0.5 + gain * change).clamp(0, 1), f"difference x {gain:.1f}")
    figure.suptitle("One image under every trigger, and what it changed (grey: nothing)")
    _save(figure, path)
