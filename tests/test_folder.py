"""A folder of images: class numbers and files are read right, or refused by name."""

import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from nba_lightning.data import Digits, ImageFolderSource, disk, folder
from nba_lightning.data.dataset import ReplacedImages
from nba_lightning.data.disk import DiskImages


def make(root: Path, names, parts=("train", "test"), number=1):
    """A folder in which the images of class `names[i]` are of the one colour `10 * i`."""
    for part in parts:
        for value, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (4, 4), (10 * value,) * 3).save(root / part / name / f"{i}.png")
    return str(root)


def order_of(source):
    """Which of the names that `make` was given each label is."""
    train, test = source.load()
    orders = [(part.read(torch.arange(len(part)))[:, 0, 0, 0] // 10)[part.labels.argsort()] for part in (train, test)]
    assert torch.equal(*orders)
    assert train.labels.tolist() == list(range(len(train)))
    return orders[0].tolist()


@pytest.fixture
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# class numbers


def test_numbers_are_counted_as_numbers_and_that_is_said(tmp_path):
    source = ImageFolderSource(make(tmp_path, [str(i) for i in range(12)]))
    with pytest.warns(UserWarning, match="order of numbers.*alphabetical order, 0, 1, 10, .*give `classes`"):
        assert order_of(source) == list(range(12))
    assert source.classes == [str(i) for i in range(12)]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("names", [["0", "1", "2"], ["000", "001"], ["cat", "dog"], ["class_1", "class_2"]])
def test_an_order_that_everybody_counts_alike_is_silent(tmp_path, names):
    assert order_of(ImageFolderSource(make(tmp_path, names))) == list(range(len(names)))


def test_an_order_that_may_be_counted_otherwise_is_told(tmp_path):
    with pytest.warns(UserWarning, match="not numbered from 0 without a gap: folder 00003 is class 0, folder 00007"):
        assert order_of(ImageFolderSource(make(tmp_path / "a", ["00003", "00007"]))) == [0, 1]
    with pytest.warns(UserWarning, match="alphabetical order.*class 1 is 'c10'; counted by .* it would be 'c2'"):
        assert order_of(ImageFolderSource(make(tmp_path / "b", ["c1", "c2", "c10"]))) == [0, 2, 1]


@pytest.mark.usefixtures("silent")
def test_given_classes_are_the_order(tmp_path):
    source = ImageFolderSource(make(tmp_path, ["0", "1", "10", "2"]), classes=["10", "2", "1", "0"])
    assert order_of(source) == [2, 3, 1, 0]
    assert source.classes == ["10", "2", "1", "0"]


def test_given_classes_that_are_not_the_folders_are_named(tmp_path):
    root = make(tmp_path, ["cat", "dog", "emu"])
    with pytest.raises(ValueError, match="the 3 folders in .*train', but got cow without a folder, and emu without a"):
        ImageFolderSource(root, classes=["cat", "dog", "cow"]).load()
    with pytest.raises(ValueError, match="got no name without a folder, and emu without a name"):
        ImageFolderSource(root, classes=["cat", "dog"]).load()
    with pytest.raises(ValueError, match="`classes` to be names that differ, but got cat more than once"):
        ImageFolderSource(root, classes=["cat", "cat"])
    with pytest.raises(ValueError, match="`classes` to be at least 2 names, but got 1"):
        ImageFolderSource(root, classes=["cat"])
    for wrong in ("cat", [0, 1]):
        with pytest.raises(ValueError, match="`classes` to be a list of folder names"):
            ImageFolderSource(root, classes=wrong)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("junk", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash"])
def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path, junk):
    root = make(tmp_path, ["cat", "dog"])
    make(tmp_path, [junk], parts=("train",))
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "desktop.ini"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"junk")
        (tmp_path / "train" / name).write_bytes(b"junk")
    make(tmp_path / "train", [junk], parts=("cat",))
    assert order_of(ImageFolderSource(root)) == [0, 1]


def test_files_that_are_left_out_are_told(tmp_path):
    root = make(tmp_path, ["cat", "dog"])
    (tmp_path / "train" / "cat" / "photo.heic").write_bytes(b"")
    (tmp_path / "train" / "stray.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 files in .*train' are left out.*: stray.png, train/cat/photo.heic\."):
        assert order_of(ImageFolderSource(root)) == [0, 1]


def test_files_come_in_the_order_of_image_folder(tmp_path):
    root = make(tmp_path, ["a", "b"], number=12)
    for nested in ("sub", "sub-1", "sub/deep", "SUB"):
        (tmp_path / "train" / "a" / nested).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / "a" / nested / "9.PNG")
    train, _ = ImageFolderSource(root).load()
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "train"))
    assert train.names == [Path(path).relative_to(tmp_path).as_posix() for path, _ in theirs.samples]
    assert train.labels.tolist() == theirs.targets


def test_a_root_that_is_none_is_told_in_one_sentence(tmp_path):
    def told(root, what):
        with pytest.raises(ValueError, match=rf"^Expected `root` to hold images as .*but got .*{what}.*\.$"):
            ImageFolderSource(str(root)).load()

    told(tmp_path / "none", "none', which does not exist")
    (tmp_path / "file").write_bytes(b"")
    told(tmp_path / "file", "file', which is a file")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    told(tmp_path / "images", "without a folder 'train': it holds cat")
    (tmp_path / "images" / "train").mkdir()
    told(tmp_path / "images", "no class folder in .*train'")
    (tmp_path / "images" / "train" / "cat").mkdir()
    told(tmp_path / "images", "one class only, 'cat', in .*train'")


def test_a_class_without_images_is_named(tmp_path):
    root = make(tmp_path, ["cat", "dog"])
    for part in ("train", "test"):
        (tmp_path / part / "emu").mkdir()
    (tmp_path / "train" / "emu" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"each class folder in .*train' to hold an image .*, but got none in emu\."):
        ImageFolderSource(root).load()


# files


@pytest.mark.parametrize("limit", [0, 10])
def test_sixteen_bits_and_floats_are_scaled_and_transparent_images_refused(tmp_path, limit):
    root = make(tmp_path, ["cat", "dog"])
    values = (np.arange(16).reshape(4, 4) * 4369).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "train" / "cat" / "0.png")
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "train" / "dog" / "0.tif")
    (tmp_path / "train" / "dog" / "0.png").unlink()
    train, _ = ImageFolderSource(root, memory_limit_mib=limit).load()
    wanted = torch.arange(16, dtype=torch.uint8).mul(17).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    assert torch.equal(train.read(torch.tensor([0, 1])), wanted)
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"train/cat/0.png' to be opaque"):
        ImageFolderSource(root, memory_limit_mib=limit).load()


def test_grey_and_colour_files_become_one_set(tmp_path):
    root = make(tmp_path, ["cat", "dog"])
    Image.new("L", (4, 4), 77).save(tmp_path / "train" / "dog" / "0.png")
    train, _ = ImageFolderSource(root).load()
    assert train.read(torch.tensor([1])).unique().tolist() == [77]
    assert train.shape == (3, 4, 4)


def truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-30])


def bomb(path):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))


def dangling(path):
    path.symlink_to(path.parent.parent / "nowhere.png")


@pytest.mark.parametrize("spoil", [truncated, bomb, dangling])
@pytest.mark.parametrize("name", ["0.png", "1.png"])  # the one that tells the shape, and another
def test_an_image_that_cannot_be_read_is_named(tmp_path, spoil, name):
    root = make(tmp_path, ["cat", "dog"], number=2)
    path = tmp_path / "train" / "cat" / name
    path.unlink()
    spoil(path)
    with pytest.raises(ValueError, match=rf"Expected .*train/cat/{name}"):
        ImageFolderSource(root).load()


def test_sizes_that_differ_between_the_parts_are_told_by_path(tmp_path):
    root = make(tmp_path, ["cat", "dog"])
    Image.new("RGB", (5, 6)).save(tmp_path / "test" / "cat" / "0.png")
    with pytest.raises(
        ValueError, match=r"\(3, 4, 4\) as the training images have, but 'test/cat/0.png' has \(3, 6, 5"
    ):
        ImageFolderSource(root).load()
    train, test = ImageFolderSource(root, image_size=8).load()
    assert train.shape == test.shape == (3, 8, 8)


def test_grey_and_colour_of_a_decoder_do_not_mix():
    shapes = [(1, 4, 4), (3, 4, 4)]
    images = DiskImages(lambda index: torch.zeros(shapes[index], dtype=torch.uint8), torch.arange(2))
    with pytest.raises(ValueError, match=r"'1' has \(3, 4, 4\). Grey and colour do not mix"):
        images.read(torch.arange(2))


@pytest.mark.parametrize("limit", [0, 10])
def test_every_image_has_the_name_of_its_file(tmp_path, limit):
    train, test = ImageFolderSource(make(tmp_path, ["cat", "dog"], number=3), memory_limit_mib=limit).load()
    assert [train.name_of(i) for i in (0, 4)] == ["train/cat/0.png", "train/dog/1.png"]
    assert test.name_of(5) == "test/dog/2.png"
    replaced = ReplacedImages(train, torch.tensor([4]), torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert replaced.name_of(4) == "train/dog/1.png"
    digits, _ = Digits().load()
    assert digits.name_of(17) == "17"
    for images in (train, replaced, digits):
        for index in (-1, len(images)):  # -1 is padding, not the last image
            with pytest.raises(ValueError, match=rf"`index` to be that of an image, in 0 to .*, but got {index}\."):
                images.name_of(index)


def test_a_set_on_disk_is_listed_not_opened(tmp_path, monkeypatch):
    opened = []
    real = folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda path, mode: opened.append(path.name) or real(path))
    root = make(tmp_path, ["cat", "dog"], number=20)
    train, _ = ImageFolderSource(root, memory_limit_mib=0).load()
    assert opened == ["0.png", "0.png"]  # one of each part, for the shape
    train.read(torch.tensor([3, 20]))
    assert opened[2:] == ["11.png", "0.png"]


def test_an_error_while_loading_comes_before_the_rest_is_decoded():
    decoded = []

    def decode(index):
        time.sleep(0.001)
        decoded.append(index)
        if index == 1:
            raise ValueError("broken")
        return torch.zeros(1, 2, 2, dtype=torch.uint8)

    with pytest.raises(ValueError, match="broken"):
        DiskImages(decode, torch.zeros(4000, dtype=torch.int64)).in_memory_copy()
    assert len(decoded) < 3000


def test_loading_that_takes_long_shows_a_bar(monkeypatch, capsys):
    images = DiskImages(lambda index: torch.full((1, 2, 2), index, dtype=torch.uint8), torch.arange(100))
    images.in_memory_copy()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(disk, "PATIENCE", -1.0)
    assert images.in_memory_copy().images[:, 0, 0, 0].tolist() == list(range(100))
    assert "Reading images" in capsys.readouterr().err
