"""Labels that do not count the classes from 0 alike in both sets are refused, whatever the source."""

import pytest
import torch
import torchvision.datasets
from PIL import Image

from nba_lightning import BackdoorDataModule
from nba_lightning.data import Digits, Source, Torchvision
from nba_lightning.data.dataset import MemoryImages, ReplacedImages


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(4).long(), r"shape \(N,\); one-hot labels are told by `labels.argmax\(1\)`, but got shape \(4, 4\)"),
        (torch.zeros(4), "of an integer type, but got torch.float32"),
        (torch.ones(4, dtype=torch.bool), "of an integer type, but got torch.bool"),
        (torch.tensor([0, 1, -1, 1]), "class numbers from 0, but got -1 at index 2"),
        (torch.zeros(3, dtype=torch.int64), "of length 4, but got 3"),
        (torch.tensor(1), r"of shape \(N,\), but got shape \(\)"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"Expected `labels` to be .*{message}"):
        MemoryImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels)


def test_labels_of_any_integer_type_are_taken():
    images = MemoryImages(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 200], dtype=torch.uint8))
    assert (images.labels.dtype, images.labels.tolist()) == (torch.int64, [0, 200])


def test_channels_last_images_are_refused():
    with pytest.raises(ValueError, match=r"channels first, but got \(2, 8, 8, 3\)"):
        MemoryImages(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.arange(2))


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 2, 2), torch.zeros(2, 1, 2, 2), torch.zeros(1, 1, 2, 2)])
def test_replacements_that_do_not_fit_are_refused(images):
    source = MemoryImages(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.arange(2))
    replacements = images if images.shape == (1, 3, 2, 2) else images.byte()
    with pytest.raises(ValueError, match=r"Expected `images` to be uint8 of shape \(1, 3, 2, 2\), but got"):
        ReplacedImages(source, torch.tensor([1]), replacements)


class Given(Source):
    """Labels as they are given, with or without names of classes."""

    def __init__(self, train, test, classes=()):
        self.parts = (train, test)
        if classes:
            self.classes = classes

    def load(self):
        train, test = (
            MemoryImages(torch.zeros(len(part), 1, 8, 8, dtype=torch.uint8), torch.tensor(part)) for part in self.parts
        )
        return train, test


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Given([0, 1], [0, 1, 2]), "of the same classes, but got only in training none and only in test 2"),
        (Given([0, 1, 2], [3, 7, 20]), "only in training 0, 1, 2 and only in test 3, 7, 20"),
        (Given([1, 2], [1, 2]), "`labels` to be from 0 without a gap, but got up to 2 without 0"),
        (Given([0, 3], [0, 3]), "`labels` to be from 0 without a gap, but got up to 3 without 1, 2"),
        (Given([0, 2], [0, 2], ["cat", "dog"]), "`labels` to be in 0 to 1, for 2 classes, but got 2"),
        (Given([0, 0], [0]), "training images of at least 2 classes, but got 1"),
    ],
)
def test_labels_that_count_otherwise_are_refused_for_any_source(source, message):
    with pytest.raises(ValueError, match=message):
        BackdoorDataModule(source, train_on="clean", clean_fraction=1.0, batch_size=2).setup()


def test_the_number_of_classes_is_that_of_the_names():
    source = Given([0, 1] * 4, [0, 1], ["cat", "dog", "emu"])
    data = BackdoorDataModule(source, train_on="clean", clean_fraction=1.0, batch_size=2)
    data.setup()
    assert data.num_classes == 3
    unnamed = Given([0, 1, 2], [0, 1, 2])
    assert unnamed.check(*unnamed.load()) == unnamed.classes == ["0", "1", "2"]
    assert Digits().classes == [str(digit) for digit in range(10)]


def test_digits_keep_an_image_of_each_class_in_both_sets():
    train, test = Digits(test_fraction=0.999).load()
    assert train.labels.bincount(minlength=10).tolist() == [1] * 10
    assert len(train) + len(test) == 1797
    with pytest.raises(ValueError, match="`test_fraction` to be large enough for a test image of each class"):
        Digits(test_fraction=0.001).load()


# torchvision


def gtsrb(root, kinds, missing=()):
    base = root / "gtsrb" / "GTSRB"
    (base / "Final_Test" / "Images").mkdir(parents=True)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for kind in kinds:
        image = Image.new("RGB", (9, 9 + kind % 2), (kind, 0, 0))
        if kind not in missing:
            (base / "Training" / f"{kind:05d}").mkdir(parents=True)
            image.save(base / "Training" / f"{kind:05d}" / "0.ppm")
        image.save(base / "Final_Test" / "Images" / f"{kind:05d}.ppm")
        lines.append(f"{kind:05d}.ppm;9;9;0;0;9;9;{kind}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines))
    return Torchvision("torchvision.datasets.GTSRB", str(root), image_size=8)


def test_a_part_of_gtsrb_is_refused_and_the_whole_is_not(tmp_path):
    with pytest.raises(ValueError, match="all of torchvision.datasets.GTSRB, .* counts folder 00003 as class 0"):
        gtsrb(tmp_path / "a", (3, 7, 20)).load()
    # Both label sets would be 0 to 2 if the folders were only counted.
    with pytest.raises(ValueError, match="counts folder 00002 as class 1"):
        gtsrb(tmp_path / "b", (0, 1, 2), missing=(1,)).load()
    with pytest.raises(ValueError, match="only in training none and only in test 2"):
        gtsrb(tmp_path / "c", (0, 1, 2), missing=(2,)).load()
    source = gtsrb(tmp_path / "d", (0, 1, 2))
    train, test = source.load()
    assert train.labels.tolist() == test.labels.tolist() == [0, 1, 2]
    assert source.classes == ["0", "1", "2"]
    source.image_size = None
    with pytest.raises(ValueError, match=r"\(3, 9, 9\) as '0' has, but '1' has \(3, 10, 9\). Set `image_size`"):
        source.load()


class Fake:
    """A set as torchvision's are, with whatever a test gives it."""

    def __init__(self, root, train=True):
        self.pictures = [Image.new(self.modes[i], (4, 4), 9) for i in range(2)]
        self.targets = self.train_targets if train else self.test_targets
        self.classes = self.train_classes if train else self.test_classes

    train_targets, test_targets, modes = [0, 1], [0, 1], ["L", "L"]
    train_classes = test_classes = ["cat", ("dog", "hound")]

    def __getitem__(self, index):
        return self.pictures[index], self.targets[index]

    def __len__(self):
        return 2


def faked(monkeypatch, **kwargs):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", type("CIFAR10", (Fake,), kwargs))
    return Torchvision()


def test_a_torchvision_set_that_is_no_classification_is_refused(monkeypatch):
    for targets in (["left.pfm", "right.pfm"], [None, None], [0.5, 1.0], torch.zeros(2, 8).long(), [0, -1], [0]):
        with pytest.raises(ValueError, match="a set with one class number for each image, but got torchvision"):
            faked(monkeypatch, train_targets=targets).load()
    with pytest.raises(ValueError, match="only in training 1 and only in test 2"):
        faked(monkeypatch, test_targets=[0, 2]).load()
    with pytest.raises(ValueError, match="8 bits, grey or RGB, but got mode I;16 at index 1"):
        faked(monkeypatch, modes=["L", "I;16"]).load()
    with pytest.raises(ValueError, match=r"'1' has \(3, 4, 4\). Grey and colour do not mix"):
        faked(monkeypatch, modes=["L", "RGB"]).load()


def test_names_of_torchvision_are_those_of_the_source(monkeypatch):
    source = faked(monkeypatch)
    source.load()
    assert source.classes == ["cat", "dog, hound"]
    with pytest.raises(ValueError, match="the same classes in both parts, but got .*'cat', 'dog, hound'.*'cat', 'emu'"):
        faked(monkeypatch, test_classes=["cat", "emu"]).load()


def test_a_set_without_a_test_part_is_told_about_splits(tmp_path):
    with pytest.raises(ValueError, match=r"train and a test part \(see `splits`\), but .*ImageNet refuses .*'test'"):
        Torchvision("torchvision.datasets.ImageNet", str(tmp_path))._open(1, download=False)
    with pytest.raises(ValueError, match="Expected `root` to hold torchvision.datasets.ImageNet"):
        Torchvision("torchvision.datasets.ImageNet", str(tmp_path), splits=("train", "val"))._open(1, download=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="Expected `root` to hold torchvision.datasets.CIFAR10"):
        Torchvision(root=str(tmp_path / "file")).load()
