import pytest
import torch
from PIL import Image

import nba_lightning.attacks as attacks
from nba_lightning.attacks import Attack, BadNets, Blended

ATTACKS = [cls for cls in Attack.__subclasses__() if cls.__module__.startswith("nba_lightning")]
SHAPES = [(1, 8, 8), (3, 32, 32), (4, 12, 20)]


def test_all_attacks_are_exported():
    assert {attack.__name__ for attack in ATTACKS} <= set(attacks.__all__)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("attack_class", ATTACKS)
def test_contract(attack_class, shape):
    attack = attack_class(target=3)
    attack.prepare(shape, 10)
    images = torch.rand(6, *shape)
    before = images.clone()
    triggered = attack(images)
    assert triggered.shape == images.shape
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert not torch.equal(triggered, images)
    torch.testing.assert_close(images, before)  # the input is left alone
    torch.testing.assert_close(attack(images)[2:3], attack(images[2:3]))  # no image depends on its neighbours
    again = attack_class(target=3)
    again.prepare(shape, 10)
    torch.testing.assert_close(again(images), triggered)
    assert attack(images.half()).dtype == torch.float16


@pytest.mark.parametrize("attack_class", ATTACKS)
def test_relabelling(attack_class):
    labels = torch.arange(5)
    attack = attack_class(target=2)
    attack.prepare((1, 8, 8), 5)
    assert attack.relabel(labels).tolist() == [2] * 5
    assert attack.eligible(labels).tolist() == [True, True, False, True, True]
    all_to_all = attack_class(all_to_all=True)
    all_to_all.prepare((1, 8, 8), 5)
    assert all_to_all.relabel(labels).tolist() == [1, 2, 3, 4, 0]
    assert all_to_all.eligible(labels).all()


@pytest.mark.parametrize("attack_class", ATTACKS)
def test_bad_arguments_are_named(attack_class):
    with pytest.raises(ValueError, match=r"Expected `poison_rate` to be in \[0, 1\), but got 1.3"):
        attack_class(poison_rate=1.3)
    with pytest.raises(ValueError, match="Expected `target` to be one of the 10 classes 0 to 9, but got 10"):
        attack_class(target=10).prepare((1, 8, 8), 10)
    with pytest.raises(RuntimeError, match="prepare"):
        attack_class()(torch.rand(1, 1, 8, 8))
    attack = attack_class()
    attack.prepare((1, 8, 8), 10)
    with pytest.raises(ValueError, match="Expected `images` to be of shape"):
        attack(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="floating-point"):
        attack(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_badnets_by_hand():
    attack = BadNets(size=2)
    attack.prepare((1, 4, 4), 2)
    grey = torch.full((1, 1, 4, 4), 0.5)
    expected = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 1, 0], [0.5, 0.5, 0, 1]]
    assert attack(grey)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("position", "corner"),
    [
        ("bottom-right", (2, 2)),
        ("bottom-left", (2, 0)),
        ("top-right", (0, 2)),
        ("top-left", (0, 0)),
        ("center", (1, 1)),
    ],
)
def test_badnets_positions(position, corner):
    attack = BadNets(size=2, position=position, pattern="white")
    attack.prepare((1, 4, 4), 2)
    marked = attack(torch.zeros(1, 1, 4, 4))[0, 0].nonzero()
    assert tuple(marked[0].tolist()) == corner
    assert len(marked) == 4


def test_badnets_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="Expected `size` to be at most the image's 8 pixels, but got 9"):
        BadNets(size=9).prepare((1, 8, 8), 10)
    with pytest.raises(ValueError, match="Expected `position` to be one of"):
        BadNets(position="left")
    with pytest.raises(ValueError, match="Expected `pattern` to be one of"):
        BadNets(pattern="rainbow")


def test_blended_by_hand():
    attack = Blended(alpha=0.25)
    attack.prepare((1, 4, 4), 2)
    black, white = attack(torch.zeros(1, 1, 4, 4)), attack(torch.ones(1, 1, 4, 4))
    torch.testing.assert_close(black[0] / 0.25, attack.blend)
    torch.testing.assert_close(white - black, torch.full((1, 1, 4, 4), 0.75))


def test_blended_reads_a_picture(tmp_path):
    Image.new("RGB", (5, 5), (255, 0, 0)).save(tmp_path / "red.png")
    attack = Blended(alpha=1.0, pattern=str(tmp_path / "red.png"))
    attack.prepare((3, 8, 8), 2)
    triggered = attack(torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(triggered.mean(dim=(0, 2, 3)), torch.tensor([1.0, 0.0, 0.0]))
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match="PIL can read"):
        Blended(pattern=str(tmp_path / "no.png")).prepare((3, 8, 8), 2)
    with pytest.raises(ValueError, match="Expected `pattern` to be an existing image file"):
        Blended(pattern="missing.png")
    with pytest.raises(ValueError, match=r"Expected `alpha` to be in \(0, 1\], but got 0"):
        Blended(alpha=0.0)
