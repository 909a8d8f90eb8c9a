import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from PIL import Image

from nba_lightning import BackdoorDataModule
from nba_lightning.attacks import LC, SIG, BadNets, WaNet
from nba_lightning.attacks.base import CLEAN, CROSS, POISONED
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.data import Digits, ImageFolderSource, Torchvision
from nba_lightning.data.dataset import Batches, MemoryImages
from nba_lightning.data.disk import DiskImages
from nba_lightning.data.partition import draw_partition
from nba_lightning.data.sampler import SeededSampler
from nba_lightning.networks import SmallCNN


@pytest.fixture
def labels():
    return torch.arange(10).repeat(200)


def draw(labels, rate=0.1, clean=0.05, validation=0.1, seed=0, target=0):
    return draw_partition(labels, labels != target, rate, clean, validation, seed)


def test_partition_keeps_its_promises(labels):
    part = draw(labels)
    assert len(part.poisoned) == 200
    assert (labels[part.poisoned] != 0).all()
    assert labels[part.clean].bincount().tolist() == [9] * 10
    assert labels[part.validation].bincount().tolist() == [1] * 10
    for one, other in ((part.poisoned, part.clean), (part.poisoned, part.validation), (part.clean, part.validation)):
        assert not torch.isin(one, other).any()
    assert not torch.isin(part.training, part.validation).any()
    assert len(part.training) == 1990


def test_partition_depends_on_the_seed_alone(labels):
    torch.manual_seed(1)
    first = draw(labels)
    torch.manual_seed(2)
    assert all(torch.equal(getattr(first, n), getattr(draw(labels), n)) for n in ("poisoned", "clean", "validation"))
    assert not torch.equal(first.poisoned, draw(labels, seed=1).poisoned)


def test_partition_refuses_impossible_shares(labels):
    with pytest.raises(ValueError, match=r"`poison_rate` to be at most 0.9 \(1800 of 2000 images"):
        draw(labels, rate=0.95)
    with pytest.raises(ValueError, match="class 0 gives between 1 and 200 clean images, but got 0.001"):
        draw(labels, clean=0.001)
    with pytest.raises(ValueError, match=r"`clean_fraction` to be in \(0, 1\], but got 1.5"):
        draw(labels, clean=1.5)
    with pytest.raises(ValueError, match="class 1 gives between 1 and 0 clean"):
        draw(labels, rate=0.9)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_sample_once(world_size):
    data = Batches(MemoryImages(torch.zeros(10, 1, 2, 2).byte(), torch.arange(10)), torch.arange(10))
    shares = [list(SeededSampler(data, False, 0, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    labels = torch.cat([data.__getitems__(share).labels for share in shares])
    assert sorted(labels[labels >= 0].tolist()) == list(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_order_is_shared_out_and_changes_with_the_epoch(world_size):
    data = Batches(MemoryImages(torch.zeros(10, 1, 2, 2).byte(), torch.arange(10)), torch.arange(10))
    orders = []
    for epoch in range(2):
        samplers = [SeededSampler(data, True, 0, rank, world_size) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        flat = [index for share in shares for index in share]
        assert len(set(flat)) == len(flat) == 10 - 10 % world_size
        orders.append(shares)
    assert orders[0] != orders[1]


def test_digits_are_real_and_split_by_class():
    train, test = Digits().load()
    assert len(train) + len(test) == 1797
    assert train.shape == (1, 8, 8)
    assert test.labels.bincount().min() >= 34
    assert int(train.images.max()) == 255


class Attached:
    """What the data module asks of a Trainer."""

    global_rank, world_size = 0, 1
    strategy = type("Strategy", (), {"root_device": torch.device("cpu")})
    precision_plugin = Precision()
    fit_loop = type("Loop", (), {"restarted_mid_epoch": False})


def test_training_batches_are_poisoned_on_the_device():
    data = BackdoorDataModule(attack=BadNets(pattern="white", target=4), batch_size=256)
    data.setup("fit")
    data.trainer = Attached()
    raw = next(iter(data.train_dataloader()))
    images, labels = data.on_after_batch_transfer(raw, 0)
    poisoned = raw.roles == POISONED
    assert 10 < int(poisoned.sum()) < 50
    assert (images[poisoned][:, :, -3:, -3:] == 1).all()
    assert (labels[poisoned] == 4).all()
    torch.testing.assert_close(images[~poisoned], raw.images[~poisoned].float() / 255)
    assert torch.equal(labels[~poisoned], raw.labels[~poisoned])


def test_clean_training_sees_no_poison_and_augments_the_same_again():
    data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=16, augment=RandomCropFlip(1))
    data.setup("fit")
    data.trainer = Attached()
    raw = next(iter(data.train_dataloader()))
    assert raw.roles is None
    first, second = (data.on_after_batch_transfer(raw, 0).images for _ in range(2))
    torch.testing.assert_close(first, second)
    assert not torch.equal(first, raw.images.float() / 255)


class OnFloats(RandomCropFlip):
    """Somebody's own augmentation: what it may do to 8 bits is not known."""

    def forward(self, images, generator=None):
        assert images.is_floating_point()
        assert images.max() <= 1
        return super().forward(images, generator)


@pytest.mark.parametrize("train_on", ["clean", "poisoned"])
def test_crops_of_8_bits_are_those_of_floats(train_on):
    found = []
    for augment in (RandomCropFlip(1), OnFloats(1)):
        data = BackdoorDataModule(attack=BadNets(), train_on=train_on, batch_size=16, augment=augment)
        data.setup("fit")
        data.trainer = Attached()
        found.append(data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0).images)
    assert torch.equal(*found)
    assert found[0].dtype == torch.float32
    assert 0.5 < float(found[0].max()) <= 1


@pytest.mark.parametrize(("device", "given", "size"), [("cpu", None, 128), ("meta", None, 512), ("cpu", 40, 40)])
def test_evaluation_takes_batches_that_suit_the_device(device, given, size):
    class On(Attached):
        strategy = type("Strategy", (), {"root_device": torch.device(device)})

    data = BackdoorDataModule(attack=BadNets(), eval_batch_size=given, clean_fraction=0.5, validation_fraction=0.5)
    data.setup("fit")
    data.trainer = On()
    assert {loader.batch_size for loader in data.test_dataloader()} == {size}
    assert data.held_out_dataloader().batch_size == size


def test_triggered_evaluation_leaves_the_target_out():
    data = BackdoorDataModule(attack=BadNets(target=4), augment=RandomCropFlip(1))
    data.setup("test")
    data.trainer = Attached()
    clean, triggered = data.test_dataloader()
    images, labels, targets = data.on_after_batch_transfer(next(iter(triggered)), 1)
    assert (labels != 4).all()
    assert (targets == 4).all()
    assert (images[:, 0, -1, -1] == 1).all()
    plain, true = data.on_after_batch_transfer(next(iter(clean)), 0)
    assert (true == 4).any()
    assert not (plain[:, 0, -3:, -3:] == 1).all(dim=(1, 2)).any()


def test_without_an_attack_there_is_one_evaluation_loader():
    data = BackdoorDataModule(train_on="clean", batch_size=16)
    data.setup("fit")
    assert len(data.test_dataloader()) == 1
    assert len(data.val_dataloader()) == 1
    assert len(data.partition.poisoned) == 0


def test_all_to_all_evaluates_every_class():
    data = BackdoorDataModule(attack=BadNets(all_to_all=True))
    data.setup("test")
    labels = torch.cat([batch.labels for batch in data.test_dataloader()[1]])
    assert len(labels.unique()) == 10


def test_bad_arguments_of_the_datamodule():
    with pytest.raises(ValueError, match="`batch_size` to be at most the 6. training images"):
        BackdoorDataModule(train_on="clean", batch_size=128).setup("fit")
    with pytest.raises(ValueError, match="Expected `train_on` to be one of clean, poisoned, untriggered, but"):
        BackdoorDataModule(train_on="dirty")
    with pytest.raises(ValueError, match=r"`clean_fraction` to be in \(0, 1\], but got 0"):
        BackdoorDataModule(clean_fraction=0)
    with pytest.raises(RuntimeError, match="setup"):
        BackdoorDataModule().train_dataloader()


@pytest.mark.parametrize("limit", [0, 10])
def test_image_folder_gives_the_pixels_from_memory_and_from_disk(image_folder, limit):
    train, test = ImageFolderSource(str(image_folder), memory_limit_mib=limit).load()
    assert isinstance(train, MemoryImages if limit else DiskImages)
    expected = np.asarray(Image.open(image_folder / "train" / "dog" / "1.png")).transpose(2, 0, 1)
    assert np.array_equal(train.read(torch.tensor([5]))[0], expected)
    assert test.labels.tolist() == [0] * 4 + [1] * 4


def test_workers_read_the_same_batches_as_memory(image_folder):
    batches = []
    for limit in (0, 10):
        data = BackdoorDataModule(
            ImageFolderSource(str(image_folder), memory_limit_mib=limit),
            train_on="clean",
            clean_fraction=1.0,
            validation_fraction=0.0,
            batch_size=4,
            num_workers=1,
        )
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(*batches, strict=True)
    )


def test_image_folders_that_do_not_fit_are_named(image_folder):
    with pytest.raises(ValueError, match="`root` to hold images as train/<class>"):
        ImageFolderSource(str(image_folder / "nowhere")).load()
    (image_folder / "test" / "cat").rename(image_folder / "test" / "cow")
    with pytest.raises(ValueError, match="same classes in train and test.*only in one of them: cat, cow"):
        ImageFolderSource(str(image_folder)).load()
    for path in (image_folder / "test" / "cow").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="test"):
        ImageFolderSource(str(image_folder)).load()


def test_images_of_other_sizes_or_none_are_named(image_folder):
    Image.new("RGB", (9, 9)).save(image_folder / "train" / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"as 'train/cat/0.png' has, but 'train/cat/1.png' has \(3, 9, 9\). Set `im"):
        ImageFolderSource(str(image_folder)).load()
    train, _ = ImageFolderSource(str(image_folder), image_size=8).load()
    assert train.shape == (3, 8, 8)
    (image_folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image '.*train/cat/1.png' to be an image file that Pillow can read"):
        ImageFolderSource(str(image_folder), image_size=8).load()


def test_torchvision_sets_by_class_path(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = torch.arange(count * 784, dtype=torch.int64).remainder(251).byte().numpy().tobytes()
        header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            (0x801).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(i % 2 for i in range(count))
        )
    train, test = Torchvision("torchvision.datasets.FashionMNIST", str(tmp_path)).load()
    assert (train.shape, len(train), len(test)) == ((1, 28, 28), 6, 4)
    assert train.read(torch.tensor([1]))[0, 0, 0, :2].tolist() == [784 % 251, 785 % 251]
    small, _ = Torchvision("torchvision.datasets.FashionMNIST", str(tmp_path), image_size=14).load()
    assert small.shape == (1, 14, 14)


def test_torchvision_errors(tmp_path):
    with pytest.raises(ValueError, match="Set `download: true`"):
        Torchvision("torchvision.datasets.CIFAR10", str(tmp_path)).load()
    with pytest.raises(ValueError, match="Expected `dataset` to be a class path such as"):
        Torchvision("torchvision.datasets.Nothing")
    with pytest.raises(ValueError, match="Expected `dataset` to be a class path such as"):
        Torchvision("os.system")
    with pytest.raises(ValueError, match="a set with a train and a test part"):
        Torchvision("torchvision.datasets.FakeData")


def test_cross_images_keep_their_labels_and_nobody_defends_with_them():
    data = BackdoorDataModule(attack=WaNet(target=4), batch_size=1000)
    data.setup("fit")
    data.trainer = Attached()
    raw = next(iter(data.train_dataloader()))
    images, labels = data.on_after_batch_transfer(raw, 0)
    plain, roles = raw.images.float() / 255, raw.roles
    assert 1.7 < (roles == CROSS).sum() / (roles == POISONED).sum() < 2.3
    assert torch.equal(labels[roles == CROSS], raw.labels[roles == CROSS])
    assert (labels[roles == POISONED] == 4).all()
    assert torch.equal(images[roles == CLEAN], plain[roles == CLEAN])
    assert not torch.isclose(images[roles == CROSS], plain[roles == CROSS]).all()
    touched = torch.cat([data.partition.poisoned, data.partition.cross])
    assert not torch.isin(torch.cat([data.partition.clean, data.partition.validation]), touched).any()


def test_a_clean_label_attack_poisons_its_target_class_and_says_what_it_can():
    data = BackdoorDataModule(attack=SIG(target=4), batch_size=64)
    data.setup("fit")
    train, _ = data._ready()
    assert set(train.labels[data.partition.poisoned].tolist()) == {4}
    with pytest.raises(ValueError, match=r"`poison_rate` to be at most 0.1008 \(145 of 1438 images.*but got 0.5"):
        BackdoorDataModule(attack=SIG(target=4, poison_rate=0.5)).setup("fit")
    with pytest.raises(ValueError, match="`poison_rate` to be at most 0.3333, so that 2 cross images are left"):
        BackdoorDataModule(attack=WaNet(poison_rate=0.4)).setup("fit")


def test_bases_replace_the_poisoned_images_and_travel_in_the_state():
    def module(**kwargs):
        data = BackdoorDataModule(attack=LC(target=4, epsilon=0.2, steps=2, **kwargs), batch_size=64)
        data.setup("fit")
        return data

    data = module(surrogate=SmallCNN(width=4, in_channels=1))
    batch = data.train_dataloader().dataset.__getitems__(list(range(len(data.partition.training))))
    images, roles = batch.images, batch.roles
    train, _ = data._ready()
    before = train.read(data.partition.training)
    changed = (images != before).flatten(1).any(dim=1)
    assert torch.equal(changed, roles == POISONED)
    again = module()  # no surrogate: the state has what it computed
    again.load_state_dict(data.state_dict())
    torch.testing.assert_close(again.train_dataloader().dataset.source.images, data.attack.bases())
    with pytest.raises(ValueError, match="Expected `surrogate` to be a trained network"):
        module().train_dataloader()


def test_another_order_keeps_the_partition():
    modules = [BackdoorDataModule(train_on="clean", batch_size=32, order_seed=seed) for seed in (None, 0, 1)]
    for data in modules:
        data.setup("fit")
    assert torch.equal(modules[0].partition.clean, modules[2].partition.clean)
    by_default, same, other = (next(iter(data.train_dataloader())).images for data in modules)
    assert torch.equal(by_default, same)
    assert not torch.equal(by_default, other)
