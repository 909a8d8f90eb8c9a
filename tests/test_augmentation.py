import pytest
import torch
import torch.nn.functional as F

from nba_lightning.core import augmentation
from nba_lightning.core.augmentation import CutMix, RandomCropFlip
from nba_lightning.core.randomness import generator_for


def test_every_result_is_a_crop_of_the_padded_image_or_its_mirror():
    images = torch.rand(64, 2, 6, 5)
    augmented = RandomCropFlip(padding=1)(images, generator_for(0))
    padded = F.pad(images, (1, 1, 1, 1))
    seen = set()
    for i in range(64):
        crops = {
            (y, x, flip): (crop.flip(2) if flip else crop)
            for y in range(3)
            for x in range(3)
            for crop in [padded[i, :, y : y + 6, x : x + 5]]
            for flip in (False, True)
        }
        found = [key for key, crop in crops.items() if torch.equal(crop, augmented[i])]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 12  # of 18, so all offsets and both directions are drawn


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("shape", "padding"), [((3, 8, 8), 1), ((1, 5, 9), 12), ((3, 64, 80), 8), ((1, 64, 64), 70)])
def test_a_slice_of_each_image_is_to_the_bit_what_one_gather_of_the_batch_is(shape, padding, flip, monkeypatch):
    images, augment = torch.rand(40, *shape), RandomCropFlip(padding, flip)
    found = []
    for pixels in (0, 10**9):
        monkeypatch.setattr(augmentation, "_SLICED_FROM", pixels)
        generator = generator_for(0)
        found.append((augment(images, generator), torch.rand(3, generator=generator)))
    sliced, gathered = found
    assert torch.equal(sliced[0], gathered[0])
    assert torch.equal(sliced[1], gathered[1])  # the same draws, so what comes after is the same too
    assert sliced[0].is_contiguous()
    assert not torch.equal(sliced[0], images)


def test_large_images_are_sliced_and_small_ones_gathered(monkeypatch):
    sizes = []
    monkeypatch.setattr(augmentation, "_sliced", lambda images, *_: sizes.append(images.shape[2]) or images)
    for side in (32, 224):
        RandomCropFlip()(torch.rand(2, 1, side, side))
    assert sizes == [224]


def test_no_padding_and_no_flip_change_nothing():
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(RandomCropFlip(0, flip=False)(images), images)


def test_every_image_gets_one_box_of_one_other():
    images = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 12, 10).contiguous()
    shares = []
    for own, mixed in enumerate(CutMix()(images, generator_for(0))):
        assert (mixed == mixed[:1]).all()  # all channels alike
        strange = mixed[0] != own
        assert len(mixed[0][strange].unique()) <= 1
        rows, columns = strange.any(1), strange.any(0)
        assert torch.equal(strange, rows[:, None] & columns)  # a rectangle,
        for line in (rows, columns):
            assert line.diff().sum() <= 2  # without gaps
        shares.append(float(strange.float().mean()))
    assert min(shares) < 0.1
    assert max(shares) > 0.6
    assert sum(shares) / 64 == pytest.approx(0.32, abs=0.08)  # a uniform share is 0.5, less what sticks out


@pytest.mark.parametrize("augment", [RandomCropFlip(), CutMix()])
def test_the_generator_decides(augment):
    images = torch.rand(16, 3, 32, 32)
    torch.testing.assert_close(augment(images, generator_for(1)), augment(images, generator_for(1)))
    assert not torch.equal(augment(images, generator_for(1)), augment(images, generator_for(2)))


@pytest.mark.parametrize("side", [8, 70])
def test_8_bits_are_moved_as_floats_are(side):
    images = torch.randint(0, 256, (6, 3, side, side), dtype=torch.uint8)
    found = RandomCropFlip(2)(images, generator_for(0))
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), RandomCropFlip(2)(images.float(), generator_for(0)))


def test_a_single_image_is_no_batch():
    with pytest.raises(ValueError, match="`images` to be a batch"):
        RandomCropFlip()(torch.rand(3, 8, 8))
