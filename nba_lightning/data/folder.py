"""A folder of one's own, with a subfolder for each class."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from nba_lightning.core.checks import check_at_least, expected, first_few
from nba_lightning.data.dataset import LabeledImages
from nba_lightning.data.disk import DiskImages
from nba_lightning.data.sources import Source, in_memory_if_small
from nba_lightning.io.images import read_image

JUNK = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
"""What operating systems leave in folders, beside names that begin with a dot; in lower case."""


class ImageFolderSource(Source):
    """A folder of one's own: ``root/train/<class>/*`` and ``root/test/<class>/*``. Images are read as RGB.

    Class numbers are positions in ``classes``. Without it they are those of torchvision's ``ImageFolder``, the
    alphabetical order of the subfolders, but for names that are all numbers, which are put in the order of numbers.
    Where a person would count otherwise a warning says so. Hidden files and folders, and those of operating systems,
    are left out.

    Args:
        root: the folder.
        classes: names of the subfolders in the order of the model's outputs; ``None`` for the order above.
        image_size: resize all images to this height and width; needed where sizes differ.
        memory_limit_mib: a set that decodes to more than this (MiB) is read from disk by workers instead.

    Raises:
        ValueError: if a part is missing, or has other classes than the other part or ``classes``, or a class has no
            image; for an image that cannot be read or has another size, by its path.
    """

    def __init__(
        self,
        root: str,
        classes: list[str] | None = None,
        image_size: int | None = None,
        memory_limit_mib: int = 2048,
    ) -> None:
        if image_size is not None:
            check_at_least("image_size", image_size, 1)
        check_at_least("memory_limit_mib", memory_limit_mib, 0)
        if classes is not None:
            check_names(classes)
        self.root, self.given, self.image_size, self.memory_limit_mib = root, classes, image_size, memory_limit_mib
        self.classes = list(classes or ())

    def load(self) -> tuple[LabeledImages, LabeledImages]:
        """Training and test set."""
        root = Path(self.root).expanduser()
        train_names, test_names = (_class_folders(root, part) for part in ("train", "test"))
        if train_names != test_names:
            raise ValueError(
                f"Expected `root` to have the same classes in train and test, but got {len(train_names)} and "
                f"{len(test_names)}; only in one of them: {first_few(sorted(train_names ^ test_names))}."
            )
        if self.given is None:
            self.classes = ordered(train_names)
        elif set(self.given) != train_names:
            missing, more = set(self.given) - train_names, train_names - set(self.given)
            raise expected(
                "classes",
                f"the names of the {len(train_names)} folders in {str(root / 'train')!r}",
                f"{first_few(sorted(missing)) or 'no name'} without a folder, and "
                f"{first_few(sorted(more)) or 'no folder'} without a name",
            )
        train = self._part(root, "train", None)
        test = self._part(root, "test", train.shape)
        return in_memory_if_small(train, self.memory_limit_mib), in_memory_if_small(test, self.memory_limit_mib)

    def _part(self, root: Path, part: str, shape: tuple[int, int, int] | None) -> DiskImages:
        listed = [list_images(root, f"{part}/{name}") for name in self.classes]
        empty = [name for name, (images, _) in zip(self.classes, listed, strict=True) if not images]
        if empty:
            raise ValueError(
                f"Expected each class folder in {str(root / part)!r} to hold an image "
                f"({', '.join(IMG_EXTENSIONS)}), but got none in {first_few(empty)}."
            )
        beside = [path.name for path in sorted((root / part).iterdir()) if visible(path.name) and path.is_file()]
        left_out = beside + [path for _, others in listed for path in others]
        if left_out:
            rank_zero_warn(
                f"{len(left_out)} files in {str(root / part)!r} are left out, since they are in no class folder or "
                f"their suffix is none of {', '.join(IMG_EXTENSIONS)}: {first_few(left_out)}."
            )
        paths = [path for images, _ in listed for path in images]
        labels = torch.tensor([label for label, (images, _) in enumerate(listed) for _ in images])
        size = None if self.image_size is None else (self.image_size, self.image_size)
        return DiskImages(Files(root, paths), labels, size, paths, shape)


class Files:
    """Decodes the image at an index.

    Args:
        root: the folder.
        paths: files in it.
        mode: see :func:`~nba_lightning.io.images.read_image`.
    """

    def __init__(self, root: Path, paths: Sequence[str], mode: Literal["RGB", "L"] = "RGB") -> None:
        self.root, self.paths, self.mode = root, paths, mode

    def __call__(self, index: int) -> Tensor:
        """Read a file.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        path = self.root / self.paths[index]
        try:
            return read_image(path, self.mode)
        except OSError as error:
            raise ValueError(f"Expected image {str(path)!r} to be readable, but got: {error}") from error


def ordered(names: set[str]) -> list[str]:
    """The order of class folders that nobody gave: torchvision's, but for numbers; warns where it may be another.

    Args:
        names: of the folders.

    Returns:
        Them in the order of class numbers.
    """
    alphabetical, counted = sorted(names), sorted(names, key=_counting)
    advice = "If your model counts its classes in another order, give `classes`."
    if all(re.fullmatch(r"[0-9]+", name) for name in names):
        odd = [f"folder {name} is class {label}" for label, name in enumerate(counted) if int(name) != label]
        if odd:
            rank_zero_warn(f"The class folders are not numbered from 0 without a gap: {first_few(odd, 3)}. {advice}")
        elif counted != alphabetical:
            rank_zero_warn(
                "Class folders are taken in the order of numbers, 0, 1, 2, ...; torchvision's ImageFolder has them in "
                f"alphabetical order, {', '.join(alphabetical[:3])}, ... {advice}"
            )
        return counted
    if counted != alphabetical:
        label = next(i for i, (one, other) in enumerate(zip(alphabetical, counted, strict=True)) if one != other)
        rank_zero_warn(
            f"Class folders are taken in alphabetical order, as by torchvision's ImageFolder, so that class {label} is "
            f"{alphabetical[label]!r}; counted by the numbers in their names it would be {counted[label]!r}. {advice}"
        )
    return alphabetical


def _counting(name: str) -> list[tuple[int, str]]:
    """A key that orders by the numbers within names."""
    return [(int(number or 0), text) for text, number in re.findall(r"([^0-9]*)([0-9]*)", name)]


def check_names(classes: Sequence[str]) -> None:
    """Raise unless these can be the names of all classes, in their order."""
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise expected("classes", "a list of folder names", repr(classes))
    twice = {name for name in classes if list(classes).count(name) > 1}
    if twice:
        raise expected("classes", "names that differ", f"{first_few(sorted(twice))} more than once")
    if len(classes) < 2:
        raise expected("classes", "at least 2 names", len(classes))


def visible(name: str) -> bool:
    """Whether a file or folder is no hidden one, and none of an operating system."""
    return not name.startswith(".") and name.lower() not in JUNK


def _class_folders(root: Path, part: str) -> set[str]:
    """Names of the folders that hold a class each."""
    folder = root / part
    if not root.exists():
        got = f"{str(root)!r}, which does not exist"
    elif not root.is_dir():
        got = f"{str(root)!r}, which is a file"
    elif not folder.is_dir():
        found = [path.name for path in sorted(root.iterdir()) if visible(path.name)]
        got = f"{str(root)!r} without a folder {part!r}: it holds {first_few(found) or 'nothing'}"
    else:
        names = {path.name for path in folder.iterdir() if visible(path.name) and path.is_dir()}
        if len(names) > 1:
            return names
        got = f"{'one class only, ' + repr(names.pop()) + ',' if names else 'no class folder'} in {str(folder)!r}"
    raise ValueError(f"Expected `root` to hold images as {part}/<class>/*, of at least 2 classes, but got {got}.")


def list_images(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """Image files and other files anywhere in a folder of the root, relative to it, in the order of ``ImageFolder``."""
    found = []
    for base, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = filter(visible, folders)
        found += [(base, name) for name in files if visible(name)]
    inside = {base: Path(base).relative_to(root).as_posix() for base, _ in found}
    images: list[str] = []
    others: list[str] = []
    for base, name in sorted(found):
        (images if name.lower().endswith(IMG_EXTENSIONS) else others).append(f"{inside[base]}/{name}")
    return images, others
