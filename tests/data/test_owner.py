"""An owner's folder: all of it used, a part held out, everything odd said or refused."""

import pytest
import torch
from PIL import Image

from nba_lightning import CleanImages, FineTuning
from nba_lightning.data.owner import fitting_batch_size, held_out_share
from nba_lightning.networks import SmallCNN


def write(root, counts, size=8, suffix="png"):
    """``counts`` images of each class."""
    generator = torch.Generator().manual_seed(0)
    for name, number in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.{suffix}")
    return root


def ready(*args, **kwargs):
    data = CleanImages(*args, **kwargs)
    data.setup()
    return data


def test_every_image_is_used_once_and_a_part_of_each_class_is_held_out(tmp_path):
    data = ready(str(write(tmp_path, {"b": 30, "a": 40})), batch_size=7)
    assert (data.classes, data.num_classes, data.image_shape) == (["a", "b"], 2, (3, 8, 8))
    assert sorted([*data.training.tolist(), *data.held_out.tolist()]) == list(range(70))
    labels = data._ready().labels
    assert torch.bincount(labels[data.held_out]).tolist() == [8, 6]
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [7] * 8
    seen = torch.cat([batch.indices for batch in data.held_out_dataloader()])
    assert torch.equal(seen, data.held_out)
    again = ready(str(tmp_path), batch_size=7)
    assert torch.equal(again.held_out, data.held_out)
    assert not torch.equal(ready(str(tmp_path), batch_size=7, seed=1).held_out, data.held_out)


def test_batches_are_in_the_unit_range_and_only_training_is_augmented(tmp_path):
    data = ready(str(write(tmp_path, {"a": 30, "b": 30})))
    raw = next(iter(data.predict_dataloader()))
    batch = data.on_after_batch_transfer(raw, 0)
    assert torch.equal(batch.images, raw.images.float() / 255)
    raw = next(iter(data.train_dataloader()))
    batch, again = (data.on_after_batch_transfer(raw, 0) for _ in range(2))
    assert batch.images.shape == raw.images.shape
    assert not torch.equal(batch.images, raw.images.float() / 255)
    assert torch.equal(batch.images, again.images)
    plain = ready(str(tmp_path), padding=0, flip=False)
    assert torch.equal(plain.on_after_batch_transfer(raw, 0).images, raw.images.float() / 255)


def test_ten_images_are_fitted_with_none_held_out(tmp_path, trainer):
    data = CleanImages(str(write(tmp_path / "images", {"a": 5, "b": 5})))
    with pytest.warns(UserWarning, match="10 to train on, 0 held out. What a fit costs in accuracy cannot be meas"):
        trainer(limit_val_batches=None).fit(FineTuning(SmallCNN(num_classes=2, width=2)), data)
    assert data.batch_size_for(1) == 2
    assert data.held_out_dataloader() is None
    assert data.val_dataloader() == []


@pytest.mark.parametrize(("images", "batch", "share"), [(10, 2, 0), (49, 12, 0), (100, 25, 0.2), (10_000, 50, 0.1)])
def test_sizes_fit_the_number_of_images(images, batch, share):
    assert fitting_batch_size(images) == batch
    assert held_out_share(images) == share
    assert fitting_batch_size(images, processes=2) == max(2, batch // 2)


def test_classes_have_the_given_order_and_may_lack_images(tmp_path):
    write(tmp_path, {"cat": 3, "dog": 4})
    with pytest.warns(UserWarning, match="1 of 3 classes have no clean image: bird. What the network knows of them"):
        data = ready(str(tmp_path), classes=["dog", "bird", "cat"])
    assert torch.bincount(data._ready().labels).tolist() == [4, 0, 3]
    assert data.num_classes == 3
    (tmp_path / "bird").mkdir()
    with pytest.raises(ValueError, match="`classes` to be given where class folders hold no image, .* none in bird"):
        ready(str(tmp_path))  # which would count dogs as class 1
    with pytest.warns(UserWarning, match="1 of 3 classes have no clean image: bird"):
        ready(str(tmp_path), classes=["dog", "bird", "cat"])
    with pytest.raises(ValueError, match="`classes` to be the names of all 2 folders with images .* none for cat"):
        ready(str(tmp_path), classes=["dog", "bird"])


def test_junk_is_skipped_and_other_files_are_said(tmp_path):
    write(tmp_path, {"a": 3, "b": 3, ".hidden": 2, "__MACOSX": 2, "@eaDir": 1})
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match="1 files in .* are left out, since their suffix .*: a/notes.txt"):
        data = ready(str(tmp_path))
    assert data.classes == ["a", "b"]
    assert len(data._ready()) == 6


def test_a_large_folder_is_thinned_and_not_read_at_once(tmp_path, monkeypatch):
    write(tmp_path, {"a": 60, "b": 20})
    opened = []
    monkeypatch.setattr("nba_lightning.data.folder.read_image", lambda path, mode: opened.append(path) or _grey())
    with pytest.warns(UserWarning, match=r"Of the 80 images in .* 40 are used, drawn class by class with seed 3"):
        data = ready(str(tmp_path), max_images=40, memory_limit_mib=0, num_workers=0, seed=3)
    assert len(opened) == 1
    assert torch.bincount(data._ready().labels).tolist() == [30, 10]
    assert not data._ready().in_memory


def _grey():
    return torch.zeros(3, 8, 8, dtype=torch.uint8)


def test_several_sizes_need_a_size(tmp_path):
    write(tmp_path, {"a": 3}, size=8)
    write(tmp_path, {"b": 3}, size=9)
    with pytest.raises(ValueError, match=r"'b/0.png' has \(3, 9, 9\). Set `image_size` to resize them"):
        ready(str(tmp_path))
    assert ready(str(tmp_path), image_size=6).image_shape == (3, 6, 6)
    assert ready(str(tmp_path), image_size=6, channels=1).image_shape == (1, 6, 6)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`images` to be a folder .* which does not exist"):
        ready(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="`images` to be a folder .* which is a file"):
        ready(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="of at least 2 classes, .* no class folder with a file"):
        ready(str(tmp_path))
    write(tmp_path, {"one": 2})
    with pytest.raises(ValueError, match="of at least 2 classes, .* which has images of 'one' alone"):
        ready(str(tmp_path))
    write(tmp_path / "split", {"train/a": 2, "train/b": 2})
    with pytest.raises(ValueError, match="its parts are folders of their own: try '.*split/train'"):
        ready(str(tmp_path / "split"))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b" / "1.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"b/1.png"):
        ready(str(tmp_path))


def test_the_fingerprint_is_of_files_and_order(tmp_path):
    write(tmp_path, {"a": 2, "b": 2})
    first = CleanImages(str(tmp_path)).fingerprint()
    assert CleanImages(str(tmp_path), classes=["a", "b"]).fingerprint() == first
    assert CleanImages(str(tmp_path), classes=["b", "a"]).fingerprint() != first
    write(tmp_path, {"a": 3})
    assert CleanImages(str(tmp_path)).fingerprint() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": 1.0}, "`held_out`"),
        ({"batch_size": 1}, "`batch_size`"),
        ({"image_size": 0}, "`image_size`"),
        ({"channels": 2}, "`channels`"),
        ({"max_images": 1}, "`max_images`"),
        ({"classes": ["a"]}, "`classes`"),
        ({"classes": ["a", "a"]}, "`classes`"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        CleanImages(".", **arguments)


def test_a_batch_larger_than_the_set_is_refused(tmp_path):
    write(tmp_path, {"a": 3, "b": 3})
    with pytest.raises(ValueError, match="`batch_size` to be at most the 6 training images over 1 processes"):
        ready(str(tmp_path), batch_size=8)
