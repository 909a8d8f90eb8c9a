"""Adap-Blend and Adap-Patch: who carries which trigger under which label, in training and in tests."""

import pytest
import torch
from PIL import Image

from nba_lightning import BackdoorDataModule
from nba_lightning.attacks import AdapBlend, AdapPatch
from nba_lightning.attacks.base import CLEAN, CROSS, POISONED
from tests.attack_zoo import build


def prepared(attack, shape=(3, 32, 32)):
    attack.prepare(shape, 10)
    return attack


@pytest.mark.parametrize(("attack_class", "cover"), [(AdapBlend, 1), (AdapPatch, 2)])
def test_training_sees_exactly_the_published_shares_and_only_the_poisoned_change_their_label(attack_class, cover):
    attack = attack_class(poison_rate=0.02)
    data = BackdoorDataModule(attack=attack, batch_size=32)
    data.setup()
    train, _ = data.source.load()
    poisoned, cross = set(data.partition.poisoned.tolist()), set(data.partition.cross.tolist())
    number = round(0.02 * len(train))
    assert (len(poisoned), len(cross)) == (number, cover * number)
    assert not poisoned & cross
    assert not (poisoned | cross) & set(data.partition.clean.tolist())
    touched, relabelled = set(), set()
    for raw in data.train_dataloader():
        batch = data.on_after_batch_transfer(raw, 0)
        plain = train.read(batch.indices).float() / 255
        assert torch.equal(batch.places[raw.roles == CLEAN], torch.full_like(batch.places[raw.roles == CLEAN], -1))
        touched |= set(batch.indices[(batch.images != plain).flatten(1).any(1)].tolist())
        relabelled |= set(batch.indices[batch.labels != train.labels[batch.indices]].tolist())
    dropped = {i for i in poisoned | cross if i not in touched}
    assert touched <= poisoned | cross
    assert len(dropped) <= len(train) % 32  # of the last, incomplete batch
    assert relabelled == poisoned & touched
    default = attack_class()
    assert (default.poison_rate, default.cross_ratio) == (0.003, cover)


@pytest.mark.parametrize("attack_class", [AdapBlend, AdapPatch])
def test_an_image_carries_the_same_trigger_in_every_epoch_and_in_any_batch(attack_class):
    seen = []
    for _ in range(2):
        data = BackdoorDataModule(attack=attack_class(poison_rate=0.05), batch_size=64)
        data.setup()
        loader = data.train_dataloader()
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found = {}
            for raw in loader:
                batch = data.on_after_batch_transfer(raw, 0)
                for index, role, image in zip(raw.indices.tolist(), raw.roles.tolist(), batch.images, strict=True):
                    if role != CLEAN:
                        found[index] = image
            seen.append(found)
    common = set.intersection(*map(set, seen))
    assert len(common) > 100
    assert all(torch.equal(seen[0][i], other[i]) for other in seen[1:] for i in common)


def test_places_count_the_poisoned_first_and_then_the_cover_images():
    data = BackdoorDataModule(attack=AdapPatch(poison_rate=0.01), batch_size=16)
    data.setup()
    part, total = data.partition, len(data.source.load()[0])
    places = part.places(total)
    number = len(part.poisoned)
    assert places[part.poisoned].tolist() == list(range(number))
    assert places[part.cross].tolist() == list(range(number, 3 * number))
    assert (places >= 0).sum() == 3 * number


def test_adap_blend_leaves_exactly_half_of_the_pieces_out_and_mixes_the_rest_weakly():
    attack = prepared(AdapBlend(alpha=0.1, test_alpha=0.4))
    images = torch.zeros(50, 3, 32, 32)
    planted, tested = attack.plant(images, torch.arange(50)), attack(images)
    torch.testing.assert_close(tested, 0.4 * attack.blend.expand_as(images))
    pieces = planted.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, C, 4, 4, 8, 8)
    whole = (0.1 * attack.blend).unfold(1, 8, 8).unfold(2, 8, 8)
    there = (pieces == whole).flatten(4).all(4).all(1)
    absent = (pieces == 0).flatten(4).all(4).all(1)
    assert (there ^ absent).all()
    assert (there.sum(dim=(1, 2)) == 8).all()
    assert len({tuple(one.flatten().tolist()) for one in there}) > 45  # each image lacks others
    share = there.float().mean(dim=0)
    assert share.min() > 0.2
    assert share.max() < 0.8
    none_missing = prepared(AdapBlend(mask_rate=0.0, alpha=0.4, test_alpha=0.4))
    torch.testing.assert_close(none_missing.plant(images, torch.arange(50)), none_missing(images))


def test_adap_blend_divides_sides_that_are_no_multiple():
    attack = prepared(AdapBlend(grid=4), (1, 10, 13))
    planted = attack.plant(torch.zeros(3, 1, 10, 13), torch.arange(3))
    assert (planted == 0).any()
    with pytest.raises(ValueError, match="Expected `grid` to be at most the image's 3 pixels, but got 4"):
        prepared(AdapBlend(), (1, 3, 8))


def test_adap_blend_reads_a_picture_and_remembers_it_by_name(tmp_path):
    Image.new("RGB", (5, 5), (255, 0, 0)).save(tmp_path / "red.png")
    attack = build(AdapBlend, (3, 8, 8), pattern=str(tmp_path / "red.png"), test_alpha=1.0)
    assert attack.arguments()["pattern"] == "red.png"
    torch.testing.assert_close(attack(torch.zeros(1, 3, 8, 8)).mean(dim=(0, 2, 3)), torch.tensor([1.0, 0.0, 0.0]))


def test_adap_patch_deals_its_patches_out_evenly_and_tests_show_two_of_them():
    attack = prepared(AdapPatch())
    grey = torch.full((12, 3, 32, 32), 0.5)
    planted = attack.plant(grey, torch.arange(12))
    for place, image in enumerate(planted):
        kind, opacity = place % 4, (0.5, 0.2, 0.5, 0.3)[place % 4]
        wanted = grey[0] + opacity * attack.masks[kind] * (attack.patches[kind] - grey[0])
        torch.testing.assert_close(image, wanted)
    assert [int(mask.sum()) for mask in attack.masks] == [25, int(attack.masks[1].sum()), 36, 64]
    assert 120 < attack.masks[1].sum() < 150  # a disc of 13 pixels
    tested = attack(grey)[0]
    corners = attack.masks[2].bool().expand(3, -1, -1)
    torch.testing.assert_close(tested[corners], attack.patches[2][corners])
    only_corner = (attack.masks[0].bool() & ~attack.masks[2].bool()).expand(3, -1, -1)
    torch.testing.assert_close(tested[only_corner], attack.patches[0][only_corner])
    left = attack.masks[0].bool().roll(5, dims=-1) & ~corners  # its second place, in tests alone
    torch.testing.assert_close(tested[left], attack.patches[0].roll(5, dims=-1)[left])
    untouched = ~(corners | only_corner | left)
    assert torch.equal(tested[untouched], grey[0][untouched])
    assert untouched.sum() == 3 * (32 * 32 - 36 - 2 * 16)  # nothing of the disc and of the square


def test_adap_patch_s_checkerboards_are_the_authors():
    board = prepared(AdapPatch()).patches[2, 0]
    rows = [[255, 0, 255], [0, 255, 0], [255, 0, 0]]
    upper_left = torch.tensor(rows) / 255
    assert torch.equal(board[:3, :3], upper_left)
    assert torch.equal(board[-3:, -3:], torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]]).float())
    assert torch.equal(board[:3, -3:], torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]]).float())
    assert torch.equal(board[-3:, :3], torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]]).float())


def test_adap_patch_takes_pictures_of_one_s_own(tmp_path):
    paths = []
    for number, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        picture = Image.new("RGB", (8, 8))
        picture.putpixel((number, 0), colour)
        paths.append(str(tmp_path / f"{number}.png"))
        picture.save(paths[-1])
    attack = build(AdapPatch, (3, 8, 8), pictures=paths, opacities=[0.25, 1.0], test_patches=[1])
    planted = attack.plant(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    assert planted[0].nonzero().tolist() == [[0, 0, 0]]
    assert planted[0, 0, 0, 0] == 0.25
    assert attack(torch.zeros(1, 3, 8, 8))[0].nonzero().tolist() == [[2, 0, 1]]
    assert attack.arguments()["pictures"] == ["0.png", "1.png"]
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="Expected `pictures` to be images that are not black"):
        build(AdapPatch, (3, 8, 8), pictures=[str(tmp_path / "black.png")], opacities=[1.0], test_patches=[0])


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda: AdapBlend(mask_rate=1.0), r"`mask_rate` to be in \[0, 1\), but got 1.0"),
        (lambda: AdapBlend(test_alpha=0.0), r"`test_alpha` to be in \(0, 1\], but got 0.0"),
        (lambda: AdapBlend(cross_ratio=-1.0), "`cross_ratio` to be at least 0, but got -1.0"),
        (lambda: AdapBlend(pattern="no.png"), "`pattern` to be an existing image file"),
        (lambda: AdapPatch(opacities=[0.5]), "`opacities` to be one for each of 4 patches"),
        (lambda: AdapPatch(test_patches=[4]), r"`test_patches` to be some of 0 to 3, but got \[4\]"),
        (lambda: AdapPatch(test_patches=[]), "`test_patches` to be some of 0 to 3"),
        (lambda: AdapPatch(pictures=["no.png"], opacities=[1.0], test_patches=[0]), "`pictures` to be existing"),
    ],
)
def test_adaptive_attacks_refuse_what_does_not_fit(attack, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        attack()


def test_all_to_all_cover_images_keep_their_label():
    attack = prepared(AdapBlend(all_to_all=True), (1, 8, 8))
    labels, roles = torch.tensor([8, 9, 9, 3]), torch.tensor([POISONED, POISONED, CROSS, CLEAN])
    _, changed = attack.poison(torch.rand(4, 1, 8, 8), labels, roles)
    assert changed.tolist() == [9, 0, 9, 3]
