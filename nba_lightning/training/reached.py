"""Whether a class is still reached from a network by what is crafted on that network alone."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Reduce, same
from nba_lightning.pseudo.class_patches import ClassPatches
from nba_lightning.pseudo.class_perturbations import ClassPerturbations
from nba_lightning.training.evidence import won

STILL_REACHED = 0.5
"""Share of the suspicious network's, from which a class counts as still reached; of networks that had forgotten the
backdoor it was 24 % at most, of those that had kept most of it 78 % at least."""
_REACHED = 0.75
"""Share of the images that must be won from the suspicious network, so that the class tells anything."""
_OTHERS = 0.25
"""Share that perturbations of the same size may win for other classes, in the middle of them."""
_MOST_OTHERS = 5
"""Classes that are not suspected and are looked at beside."""
_SIZES = (0.072, 0.036, 0.018)
_STEPS, _IMAGES_EACH, _IMAGES_OF_PATCH = 16, 12, 4
_ASKED = 100
"""Images on which networks are asked, about."""


def still_reached(
    network: nn.Module,
    suspicious: nn.Module,
    classes: Sequence[int],
    batches: Iterator[Tensor],
    generator: torch.Generator | None = None,
    reduce: Reduce = same,
) -> float:
    """How easily suspected classes are reached from a network that should have forgotten the backdoor.

    Verification crafts what the suspicious network falls for and the teacher withstands, so a part of the backdoor that
    the teacher has kept is not in it. Here perturbations and patches are crafted on each network alone, without a
    teacher: patches of the 16 cells of a grid, of which the best counts, and perturbations of the largest size that
    wins the class from the suspicious network, and from neither network, as larger ones do, every other class as well.

    Args:
        network: the one to ask.
        suspicious: the suspicious network, of the same classes.
        classes: the suspected ones, at least one.
        batches: endless clean images `(B, C, H, W)` in [0, 1].
        generator: source of randomness, the same on all processes.
        reduce: averages a tensor over all processes.

    Returns:
        The share of the images that the network loses, in units of what the suspicious one loses; the largest of all
        classes and of both kinds. 0 where neither kind reaches a class from the suspicious network.

    Source: ours; a patch or perturbation that turns all images to a class tells a backdoor in Neural Cleanse (Wang et
    al., IEEE S&P 2019), there the smallest one of a network, here the same one of two.
    """
    images = [next(batches)]
    while sum(map(len, images)) < _ASKED:
        images.append(next(batches))
    with torch.no_grad(), evaluating(suspicious):
        number = predict(suspicious, images[0][:1]).shape[1]
    wanted = torch.tensor(classes, device=images[0].device)
    others = [k for k in range(number) if k not in classes][:_MOST_OTHERS]

    def by_patches(one: nn.Module) -> Tensor:
        crafting = ClassPatches(steps=_STEPS, images_each=_IMAGES_OF_PATCH, classes=classes)
        crafted(crafting, one)
        contents, covers = crafting.placed(images[0])
        shares = won(one, images, crafting.rows_of(wanted), contents, reduce, covers)
        return shares.view(len(classes), -1).amax(dim=1)

    def by_perturbations(one: nn.Module, size: float, some: Sequence[int]) -> Tensor:
        rows = crafted(ClassPerturbations((size,), _STEPS, _IMAGES_EACH, some), one)
        return won(one, images, torch.tensor(some, device=rows.device), rows, reduce)

    def crafted(crafting: ClassPatches | ClassPerturbations, one: nn.Module) -> Tensor:
        crafting.guided = False
        crafting.regenerate(one, one, batches, generator, reduce)
        return crafting.bank

    def largest(now: Tensor, came: Tensor, tells: Tensor) -> float:
        return float(torch.where(tells, now / came.clamp(min=1e-12), 0.0).amax())

    came = by_patches(suspicious)
    found = largest(by_patches(network), came, came >= _REACHED) if bool((came >= _REACHED).any()) else 0.0
    left = list(classes)
    for size in _SIZES if others else ():
        shares = by_perturbations(suspicious, size, [*left, *others])
        came = shares[: len(left)]
        tells = (came >= _REACHED) & (shares[len(left) :].median() <= _OTHERS)
        if bool(tells.any()):
            now = by_perturbations(network, size, [*left, *others])
            tells = tells & (now[len(left) :].median() <= _OTHERS)
            found = max(found, largest(now[: len(left)], came, tells))
        left = [k for k, told in zip(left, tells.tolist(), strict=True) if not told]
        if not left:
            break
    return found


def passes_of_reached(classes: int, known: int) -> int:
    """How many times an image goes forwards or backwards through a network, at most.

    Args:
        classes: of the network.
        known: suspected ones.
    """
    others = min(classes - known, _MOST_OTHERS)
    patches = 2 * ClassPatches().grid ** 2 * known * (2 * _STEPS * _IMAGES_OF_PATCH + 2 * _ASKED)
    small = len(_SIZES) * 2 * (known + others) * (2 * _STEPS * _IMAGES_EACH + 2 * _ASKED)
    return patches + small
