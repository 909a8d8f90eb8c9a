"""Which images an owner's folder holds, of which class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from nba_lightning.core.checks import expected, first_few
from nba_lightning.data.folder import list_images, ordered, visible


def listed(root: Path, given: Sequence[str] | None) -> tuple[list[str], list[str], Tensor]:
    """The images of ``root/<class>/*``.

    Args:
        root: the folder.
        given: names of the classes in the order of the model's outputs; ``None`` for that of the folders.

    Returns:
        Names of the K classes, image files `(N)` relative to the root, and their classes `(N,)`, in this order.

    Raises:
        ValueError: for a folder that is none, images of fewer than two classes, a folder with images that has no name,
            or one without images where no names are given, which would shift the numbers of all others.
    """
    found = {name: list_images(root, name) for name in sorted(class_folders(root))}
    with_images = {name for name, (images, _) in found.items() if images}
    if len(with_images) < 2:
        raise expected("images", "a folder with images of at least 2 classes, as <class>/*", _got(root, with_images))
    if given is None and len(found) > len(with_images):
        empty = first_few(sorted(found.keys() - with_images))
        raise expected("classes", "given where class folders hold no image", f"None, with none in {empty}")
    classes = ordered(with_images) if given is None else list(given)
    if unnamed := sorted(with_images - set(classes)):
        what = f"the names of all {len(with_images)} folders with images in {str(root)!r}"
        raise expected("classes", what, f"none for {first_few(unnamed)}")
    _tell(root, [name for name in classes if name not in with_images], len(classes), found)
    images = [found[name][0] if name in found else [] for name in classes]
    labels = torch.tensor([label for label, paths in enumerate(images) for _ in paths])
    return classes, [path for paths in images for path in paths], labels


def class_folders(root: Path) -> list[str]:
    """Names of the folders that may hold a class each.

    Raises:
        ValueError: if the root is none.
    """
    if not root.is_dir():
        got = f"{str(root)!r}, which {'is a file' if root.exists() else 'does not exist'}"
        raise expected("images", "a folder with images as <class>/*", got)
    return [path.name for path in root.iterdir() if visible(path.name) and path.is_dir()]


def _got(root: Path, with_images: set[str]) -> str:
    parts = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    advice = f" (its parts are folders of their own: try {str(root / parts[0])!r})" if parts else ""
    one = f"images of {next(iter(with_images))!r} alone" if with_images else None
    holds = one or f"no class folder with a file {', '.join(IMG_EXTENSIONS)}"
    return f"{str(root)!r}, which has {holds}{advice}"


def _tell(root: Path, missing: Sequence[str], classes: int, found: dict[str, tuple[list[str], list[str]]]) -> None:
    """What is not there, and what is left out."""
    if missing:
        rank_zero_warn(
            f"{len(missing)} of {classes} classes have no clean image: {first_few(missing)}. What the network knows of "
            "them may be lost, and is measured by nothing here."
        )
    others = [path for _, files in found.values() for path in files]
    if others:
        rank_zero_warn(
            f"{len(others)} files in {str(root)!r} are left out, since their suffix is none of "
            f"{', '.join(IMG_EXTENSIONS)}: {first_few(others)}."
        )
