"""Image files come in as 8 bits with what is seen unchanged, or not at all."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nba_lightning.io.images import read_image

VALUES = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
COLOURS = np.stack([VALUES, VALUES[::-1], VALUES.T], axis=2)


def png16(path, values):
    """Write `(H, W, C)` of 16 bits as PNG, which Pillow cannot."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    )


def scaled(values):
    return torch.from_numpy(np.rint(values / 257).astype(np.uint8)).movedim(-1, 0)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_of_grey_are_scaled(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(VALUES).save(path)
    grey = scaled(VALUES[..., None])
    assert torch.equal(read_image(path, "L"), grey)
    assert torch.equal(read_image(path), grey.expand(3, -1, -1))


@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bits_of_colour_are_scaled(tmp_path, alpha):
    values = np.concatenate([COLOURS, np.full((8, 8, 1), 65535, np.uint16)], axis=2) if alpha else COLOURS
    png16(tmp_path / "a.png", values)
    assert (read_image(tmp_path / "a.png").int() - scaled(COLOURS).int()).abs().max() <= 1
    values = np.concatenate([COLOURS, np.full((8, 8, 1), 65279, np.uint16)], axis=2)
    png16(tmp_path / "b.png", values)
    with pytest.raises(ValueError, match=r"b\.png' to be opaque"):
        read_image(tmp_path / "b.png")


def test_floats_in_the_unit_interval_are_scaled(tmp_path):
    values = (VALUES / 65535).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif", "L")[0], torch.from_numpy(np.rint(values * 255)).byte())


@pytest.mark.parametrize("wrong", [255.0, -0.1, float("nan")])
def test_other_floats_are_refused(tmp_path, wrong):
    Image.fromarray(np.array([[0.5, wrong]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif' to be in \[0, 1\] where it holds floats, but got values from"):
        read_image(tmp_path / "a.tif")


def test_thirty_two_bits_are_refused(tmp_path):
    Image.fromarray(VALUES.astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="of 8 bits, or of 16 unsigned ones with 65535 as white, but got mode I"):
        read_image(tmp_path / "a.tif")


def test_twelve_bits_are_refused(tmp_path):
    """Twelve bits would come out sixteen times too dark."""
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3), (339, 1)]
    data = b"\x12\x34\x56\0" + struct.pack("<H", len(entries))
    data += b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries) + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 12) + data)
    with pytest.raises(ValueError, match="of 16 unsigned ones with 65535 as white"):
        read_image(tmp_path / "a.tif")


def test_signed_numbers_are_refused(tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(ValueError, match="of 16 unsigned ones with 65535 as white"):
        read_image(tmp_path / "a.tif")


def test_an_alpha_channel_must_be_opaque(tmp_path):
    rgba = np.full((4, 5, 4), 255, np.uint8)
    rgba[..., 0] = np.arange(20).reshape(4, 5)
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    assert torch.equal(read_image(tmp_path / "opaque.png"), torch.from_numpy(rgba[..., :3]).movedim(2, 0))
    rgba[2, 3, 3] = 254
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match=r"clear\.png' to be opaque.* background.*, but got one that is transparent"):
        read_image(tmp_path / "clear.png")


def test_a_transparent_palette_entry_counts_where_it_is_used(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "used.png", transparency=1)
    picture.save(tmp_path / "none.png")
    assert read_image(tmp_path / "none.png").flatten(1).T.tolist() == [[10, 20, 30], [40, 50, 60]]
    with pytest.raises(ValueError, match="transparent somewhere"):
        read_image(tmp_path / "used.png")


def test_a_transparent_colour_counts_where_it_is_used(tmp_path):
    picture = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    picture.save(tmp_path / "used.png", transparency=(4, 5, 6))
    picture.save(tmp_path / "unused.png", transparency=(9, 9, 9))
    assert read_image(tmp_path / "unused.png").flatten(1).T.tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="transparent somewhere"):
        read_image(tmp_path / "used.png")


def test_single_bits_and_cmyk_are_converted(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png").tolist() == [[[255, 0]]] * 3
    Image.new("CMYK", (2, 1), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert read_image(tmp_path / "cmyk.tif").tolist() == [[[255, 255]], [[0, 0]], [[0, 0]]]


def test_grey_is_the_luma(tmp_path):
    Image.new("RGB", (1, 1), (255, 0, 0)).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png", "L").tolist() == [[[76]]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"b.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"b\.{suffix}' to be a whole image file, but got a truncated"):
        read_image(tmp_path / f"b.{suffix}")


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png' to be an image file that Pillow can read"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="to be a whole image file"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.png' to be an image file"):
        read_image(tmp_path / "none.png")


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png' to be of at most 200 pixels"):
        read_image(tmp_path / "a.png")


def test_a_transparent_grey_of_sixteen_bits_counts_where_it_is_used(tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "used.png", transparency=2000)
    Image.fromarray(VALUES).save(tmp_path / "unused.png", transparency=2001)
    assert torch.equal(read_image(tmp_path / "unused.png", "L"), scaled(VALUES[..., None]))
    with pytest.raises(ValueError, match="transparent somewhere"):
        read_image(tmp_path / "used.png")


def test_colours_of_eight_bits_in_sixteen_are_exact(tmp_path):
    eight = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    png16(tmp_path / "a.png", eight.astype(np.uint16) * 257)
    assert torch.equal(read_image(tmp_path / "a.png"), torch.from_numpy(eight).movedim(2, 0))
