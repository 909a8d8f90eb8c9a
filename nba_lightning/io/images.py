"""Reading one image file into 8 bits, without a conversion that changes what is seen."""

import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from nba_lightning.core.checks import expected
from nba_lightning.core.randomness import generator_for

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, OverflowError, struct.error, zlib.error)
"""What Pillow's many decoders raise for files that are no whole image."""
_OPAQUE = "opaque, or with its transparent parts painted over (`image.convert('RGBA')` onto a background)"


def read_image(path: str | Path, mode: Literal["RGB", "L"] = "RGB") -> Tensor:
    """Read an image file into 8 bits a channel.

    Palettes, CMYK and single bits are converted; 16 bits are divided by 257 and rounded (in colour images Pillow takes
    the high byte, which is at most one level off); floats in [0, 1] are multiplied by 255 and rounded; an alpha channel
    that is opaque everywhere is dropped. Of several frames the first is taken, and a rotation that only the camera
    noted (EXIF) is not applied, as in torchvision.

    Args:
        path: a file in any format that Pillow reads.
        mode: ``RGB``, or ``L`` for the luma.

    Returns:
        `(C, H, W)`, uint8, with C = 3 or 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no whole image, is larger than Pillow's limit, is transparent somewhere,
            or holds numbers whose white is not known (floats outside [0, 1], 12 or 32 bits).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Expected {str(path)!r} to be an image file, but there is none.")
    try:
        with Image.open(path) as picture:
            picture.load()
            image = _eight_bits(picture, path)
    except Image.DecompressionBombError as error:
        raise _refuse(path, f"of at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels", error) from error
    except UnidentifiedImageError as error:
        raise _refuse(path, "an image file that Pillow can read", "something else") from error
    except _RefusedError:
        raise
    except _BROKEN as error:
        raise _refuse(path, "a whole image file", f"a truncated or broken one ({error})") from error
    found: Tensor = pil_to_tensor(image.convert(mode))
    return found


def read_pattern(path: str, image_shape: tuple[int, int, int]) -> Tensor:
    """Read a picture as a pattern for images of shape `(C, H, W)`, resized to them.

    Args:
        path: an image file without transparency.
        image_shape: `(C, H, W)`, C 1 or 3.

    Returns:
        `(C, H, W)`, float, values in [0, 1].

    Raises:
        ValueError: for images of other channels, or a file that :func:`read_image` does not read.
    """
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise expected("pattern", f"None for images of {channels} channels", repr(path))
    try:
        picture = read_image(path, "L" if channels == 1 else "RGB")
    except ValueError as error:
        raise expected("pattern", "an opaque image file that can be read", f"this: {error}") from error
    resized: Tensor = resize(picture, [height, width], antialias=True)
    return resized.float() / 255


def pattern_or_noise(path: str | None, image_shape: tuple[int, int, int], seed: int) -> Tensor:
    """A picture as :func:`read_pattern` gives it; without one, uniform noise `(C, H, W)` drawn from a seed."""
    if path is None:
        return torch.rand(image_shape, generator=generator_for(seed))
    return read_pattern(path, image_shape)


class _RefusedError(ValueError):
    """A whole image that cannot become 8 bits without a guess."""


def _refuse(path: Path, what: str, got: Any) -> _RefusedError:
    return _RefusedError(f"Expected image {str(path)!r} to be {what}, but got {got}.")


def _eight_bits(picture: Image.Image, path: Path) -> Image.Image:
    """The same picture as ``L`` or ``RGB``, opaque."""
    if picture.mode.startswith("I"):
        return Image.fromarray(((_sixteen_bits(picture, path) + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        values = np.asarray(picture)
        if not ((values >= 0) & (values <= 1)).all():
            found = f"values from {values.min():.4g} to {values.max():.4g}"
            raise _refuse(path, "in [0, 1] where it holds floats", found)
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            raise _refuse(path, _OPAQUE, "one that is transparent somewhere")
    return picture if picture.mode == "L" else picture.convert("L" if picture.mode == "1" else "RGB")


def _sixteen_bits(picture: Image.Image, path: Path) -> np.ndarray[Any, Any]:
    """Values `(H, W)` from 0 (black) to 65535 (white), or an error where white is another number."""
    tags = getattr(picture, "tag_v2", {})  # of TIFF: 258 is the number of bits, 339 their kind, 262 what 0 means
    sixteen = picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")  # which Pillow scales to 16
    bits, kind, zero = tags.get(258, (16,)), tags.get(339, (1,)), tags.get(262, 1)
    if not sixteen or tuple(bits) != (16,) or tuple(kind) != (1,) or zero != 1:
        raise _refuse(path, "of 8 bits, or of 16 unsigned ones with 65535 as white", f"mode {picture.mode}")
    values = np.asarray(picture).astype(np.int64)
    if (values == picture.info.get("transparency", -1)).any():
        raise _refuse(path, _OPAQUE, "one that is transparent somewhere")
    return values
