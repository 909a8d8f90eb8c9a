"""Pictures for the report: pseudo samples, and attention of the networks on the same images."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor, nn

from nba_lightning.app.chain import write_json
from nba_lightning.core.features import features, predict
from nba_lightning.core.functional import attention_map
from nba_lightning.core.modes import evaluating
from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.data.owner import CleanImages
from nba_lightning.io.adapters import Normalized
from nba_lightning.training.distillation import Distillation

_DRAWN, _SHOWN = 64, 12
_CELLS = 4
"""Of an attention map, each way."""


def save_pictures(folder: Path, module: Distillation, suspicious: nn.Module, data: CleanImages) -> list[str]:
    """Write what :mod:`nba_lightning.app.report` shows as pictures into a folder.

    Args:
        folder: ``report/`` of the output folder.
        module: after its fit.
        suspicious: the network that came in.
        data: the clean images.

    Returns:
        A warning where there are no pictures.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return []
    networks = {"suspicious": suspicious, "teacher": module.teacher_network(), "cleaned": module.model}
    try:
        for network in networks.values():
            network.cpu()
        with torch.no_grad(), evaluating(*networks.values()):
            _save(folder, module, {name: network.float() for name, network in networks.items()}, data)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return [f"The report has no pictures: {error}"]
    return []


def _save(folder: Path, module: Distillation, networks: Mapping[str, nn.Module], data: CleanImages) -> None:
    chosen = shuffled(len(data.training), data.seed, 17)[:_DRAWN]
    batch = data.images_at(data.training[chosen])
    images, labels = batch.images.float() / 255, batch.labels
    assert labels is not None
    folder.mkdir(parents=True, exist_ok=True)
    _attention(folder, module, networks, images[:_SHOWN], labels[:_SHOWN])
    pseudo: Any = getattr(module, "pseudo", None)
    if pseudo is None:
        return
    changes = pseudo.cpu()(images, module.model, module.teacher_network(), generator_for(data.seed, 18))
    perturbed = (images + changes).clamp(0.0, 1.0)
    doubt = nn.functional.cross_entropy(predict(networks["suspicious"], perturbed), labels, reduction="none")
    strongest = doubt.argsort(descending=True)[:_SHOWN]
    shown = {"images": _pixels(images[strongest]), "perturbed": _pixels(perturbed[strongest])}
    save_file(shown, folder / "pseudo.safetensors")
    samples = _answers(networks, perturbed[strongest], labels[strongest])
    write_json(
        folder / "pseudo.json", {"samples": [{**one, "source": _words(type(pseudo).__name__)} for one in samples]}
    )


def _attention(
    folder: Path, module: Distillation, networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor
) -> None:
    maps: dict[str, dict[str, Tensor]] = {}
    for name, network in networks.items():
        observed = features(network, images, module.observed_layers())[1]
        maps[name] = {layer: value for layer, value in observed.items() if value.ndim == 4}
    layers = list(maps["cleaned"])
    if not layers:
        return  # a network without feature maps, or a fit that observed none
    # The last one whose map has cells enough to show a place; the last of all where none has.
    layer = next((name for name in reversed(layers) if min(maps["cleaned"][name].shape[2:]) >= _CELLS), layers[-1])
    shape = {name: found[layer].shape[2:] for name, found in maps.items()}
    tensors = {name: attention_map(found[layer]).view(-1, *shape[name]).contiguous() for name, found in maps.items()}
    save_file({"images": _pixels(images), **tensors}, folder / "attention.safetensors")
    theirs = layer.removeprefix("network.") if isinstance(networks["cleaned"], Normalized) else layer
    write_json(folder / "attention.json", {"layer": theirs, "samples": _answers(networks, images, labels)})


def _words(name: str) -> str:
    """``TriggerFamilies`` as trigger families."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()


def _answers(networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = [{"class": int(label)} for label in labels]
    for name, network in networks.items():
        confidences, classes = predict(network, images).softmax(dim=1).max(dim=1)
        for sample, label, value in zip(samples, classes.tolist(), confidences.tolist(), strict=True):
            sample[name] = {"class": label, "probability": value}
    return samples


def _pixels(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8).contiguous()
