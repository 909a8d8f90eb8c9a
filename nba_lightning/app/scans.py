"""The quick scans of the chain, as plain values for the report."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nba_lightning.data.owner import CleanImages

_STARTS = 10
_LEVEL = 0.05


def quick_scans(seed: int, max_images: int = 1000) -> list[Any]:
    """The scans that take minutes at most: one without images, one forward pass.

    Raises:
        ImportError: where this package comes without scans.
    """
    from nba_lightning.scan import ClassShift, MaximumMargin

    return [MaximumMargin(starts=_STARTS, seed=seed), ClassShift(seed=seed, max_images=max_images)]


def scan_cost(num_classes: int, images: int, without: bool = False) -> str:
    """What the scans will cost, before they start."""
    margins = 2 * 100 * _STARTS * num_classes
    return f"about {margins + (0 if without else min(images, 1000)):,} passes of an image through the network"


def run_scans(
    network: nn.Module,
    names: Sequence[str],
    device: torch.device,
    data: CleanImages | None,
    image_shape: tuple[int, int, int],
    seed: int = 0,
    bar: bool = True,
) -> dict[str, Any]:
    """Scan a network; a scan that cannot be made becomes a warning.

    Args:
        network: images in [0, 1] to logits.
        names: of its K classes.
        device: to scan on.
        data: clean images; ``None`` runs only what needs none.
        image_shape: `(C, H, W)`.
        seed: of the scans.
        bar: whether they show progress.

    Returns:
        ``classes`` (for each method a list of ``{class, statistic, p_value}``), ``verdict`` (a sentence for each
        method), ``level`` and ``warnings``.
    """
    found: dict[str, Any] = {"classes": {}, "verdict": {}, "level": _LEVEL, "warnings": []}
    try:
        from nba_lightning.scan import sentence

        scans = quick_scans(seed)
    except ModuleNotFoundError as error:
        if error.name != "nba_lightning.scan":
            raise
        found["warnings"].append("No scan was made: this version comes without scans.")
        return found
    network.to(device)
    for scan in scans:
        if scan.needs_images and data is None:
            continue
        try:
            result = scan(network, None if data is None else clean_images(data), image_shape, progress=bar)
        except (ValueError, RuntimeError) as error:
            found["warnings"].append(f"The scan {scan.name} could not be made: {error}")
            continue
        rows = zip(names, result.statistics, result.p_values, strict=True)
        found["classes"][scan.name] = [{"class": n, "statistic": s, "p_value": p} for n, s, p in rows]
        found["verdict"][scan.name] = sentence(result, _LEVEL, list(names))
    return found


def clean_images(data: CleanImages) -> Iterator[tuple[Tensor, Tensor]]:
    """All images `(B, C, H, W)` in [0, 1] and labels `(B,)`, the same on each process."""
    data.trainer = None  # one that a fit left would divide the images among its processes
    for batch in data.predict_dataloader():
        yield batch.images.float() / 255, batch.labels
