import pytest
import torch
import torch.nn.functional as F

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
