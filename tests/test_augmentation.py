import torch
import torch.nn.functional as F

from nba_lightning.augmentation import RandomCropFlip
from nba_lightning.randomness import generator_for


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


def test_the_generator_decides():
    images = torch.rand(16, 3, 32, 32)
    augment = RandomCropFlip()
    torch.testing.assert_close(augment(images, generator_for(1)), augment(images, generator_for(1)))
    assert not torch.equal(augment(images, generator_for(1)), augment(images, generator_for(2)))
