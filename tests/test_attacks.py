import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import nba_lightning.attacks as attacks
from nba_lightning.attacks import (
    BPP,
    LC,
    LF,
    SIG,
    SSBA,
    AdapBlend,
    AdaptiveAttack,
    BadNets,
    Blended,
    FTrojan,
    InputAware,
    Refool,
    TrojanNN,
    WaNet,
    wanet,
)
from nba_lightning.attacks.base import CLEAN, CROSS, POISONED
from nba_lightning.attacks.bpp import floyd_steinberg
from nba_lightning.attacks.ftrojan import dct_matrix
from nba_lightning.core.features import features
from nba_lightning.core.randomness import generator_for, shuffled
from nba_lightning.io.batches import Batch
from nba_lightning.io.weights import save_weights
from nba_lightning.networks import SmallCNN
from tests.attack_zoo import ATTACKS, TinySet, arguments, build, compute
from tests.reference import triggers

SHAPES = [(1, 8, 8), (3, 32, 32), (4, 12, 20)]


def kwargs_for(attack_class, shape):
    return {"block": 4} if attack_class is FTrojan and shape[1] != shape[2] else {}


def test_all_attacks_are_exported():
    assert {attack.__name__ for attack in ATTACKS} <= set(attacks.__all__)
    assert len(ATTACKS) >= 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("attack_class", ATTACKS)
@torch.no_grad()
def test_contract(attack_class, shape):
    kwargs = kwargs_for(attack_class, shape)
    attack = build(attack_class, shape, target=3, **kwargs)
    images = torch.rand(6, *shape)
    before = images.clone()
    triggered = attack(images)
    assert triggered.shape == images.shape
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert not torch.equal(triggered, images)
    torch.testing.assert_close(images, before)  # the input is left alone
    torch.testing.assert_close(attack(images)[2:3], attack(images[2:3]))  # no image depends on its neighbours
    torch.testing.assert_close(build(attack_class, shape, target=3, **kwargs)(images), triggered)
    assert attack(images.half()).dtype == torch.float16


SEEDS = {
    "AdapBlend": "pattern_seed",
    "AdapPatch": "pattern_seed",
    "Blended": "pattern_seed",
    "LF": "pattern_seed",
    "TrojanNN": "pattern_seed",
    "WaNet": "grid_seed",
    "Refool": "reflection_seed",
}


@pytest.mark.parametrize("attack_class", ATTACKS)
@torch.no_grad()
def test_the_state_brings_back_the_exact_trigger(attack_class, tmp_path):
    attack, images = build(attack_class, (3, 16, 16)), torch.rand(4, 3, 16, 16)
    path = str(tmp_path / "attack.safetensors")
    save_weights(attack.state_dict(), path)
    torch.manual_seed(99)
    extra = arguments(attack_class, 3)
    extra.pop("surrogate", None)  # what was computed with it is in the state
    seed = {SEEDS[attack_class.__name__]: 77} if attack_class.__name__ in SEEDS else {}
    again = attack_class(**extra, **seed, state=path)
    again.prepare((3, 16, 16), 10)
    compute(again, TinySet((3, 16, 16)))
    assert torch.equal(again(images), attack(images))
    if seed and not extra:
        assert not torch.equal(build(attack_class, (3, 16, 16), **seed)(images), attack(images))
    other = BadNets if attack_class is not BadNets else SIG
    with pytest.raises(ValueError, match=f"`state` to be of a {other.__name__}, but got that of a"):
        other(state=path).prepare((3, 16, 16), 10)


@pytest.mark.parametrize("attack_class", [Blended, AdapBlend, WaNet, Refool, LC])
def test_a_state_of_another_image_size_is_named(attack_class, tmp_path):
    path = str(tmp_path / "attack.safetensors")
    save_weights(build(attack_class, (1, 8, 8)).state_dict(), path)
    again = attack_class(**({"steps": 3} if attack_class is LC else {}), state=path)
    if attack_class is LC:  # its adversarial images are compared where they are used
        again.prepare((1, 8, 8), 10)
        with pytest.raises(ValueError, match="same data, seed, target and poisoning rate"):
            compute(again, TinySet((1, 8, 8)), poisoned=(3, 13, 33))
        return
    with pytest.raises(ValueError, match="with the same arguments and image shape"):
        again.prepare((3, 32, 32), 10)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (SIG(delta=20 / 255), SIG(), rf"delta={20 / 255} instead of {40 / 255}"),
        (BadNets(pattern="white"), BadNets(), "pattern='white' instead of 'checkerboard'"),
        (BadNets(target=3), BadNets(), "target=3 instead of 0"),
        (BadNets(all_to_all=True, size=2), BadNets(), "all_to_all=True instead of False, size=2 instead of 3"),
        (FTrojan(positions=[(1, 1)]), FTrojan(), r"positions=\[\[1, 1\]\] instead of None"),
    ],
)
def test_a_state_made_under_other_arguments_is_refused(before, after, told):
    for attack in (before, after):
        attack.prepare((3, 16, 16), 10)
    with pytest.raises(ValueError, match=f"`state` to be of a {type(after).__name__} with the same .* one with {told}"):
        after.restore(before.state_dict())


@pytest.mark.parametrize("attack_class", ATTACKS)
def test_all_arguments_of_an_attack_are_compared_with_a_state(attack_class):
    """But for seeds and the free ones: a constructor must keep each in an attribute of the same name."""
    names = set()
    for base in attack_class.__mro__[: attack_class.__mro__.index(torch.nn.Module)]:
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters) - {"self", "kwargs"}
    compared = build(attack_class).arguments()
    assert {"target", "all_to_all"} <= compared.keys()
    assert {n for n in names if not n.endswith("_seed")} == compared.keys() | (names & attack_class.free_arguments)


def test_rates_and_seeds_may_differ_from_the_state():
    attack = build(WaNet, (3, 16, 16), poison_rate=0.1, cross_ratio=2.0, grid_seed=1)
    other = build(WaNet, (3, 16, 16), poison_rate=0.2, cross_ratio=1.0, grid_seed=2)
    other.restore(attack.state_dict())
    assert torch.equal(other.field, attack.field)
    assert (other.poison_rate, other.cross_ratio) == (0.2, 1.0)


def test_a_picture_may_lie_elsewhere_but_not_be_another(tmp_path):
    for name in ("here/a.png", "there/a.png", "there/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 5), (255, 0, 0)).save(tmp_path / name)
    state = build(Blended, (3, 8, 8), pattern=str(tmp_path / "here/a.png")).state_dict()
    build(Blended, (3, 8, 8), pattern=str(tmp_path / "there/a.png")).restore(state)
    with pytest.raises(ValueError, match=r"pattern='a.png' instead of 'b.png'"):
        build(Blended, (3, 8, 8), pattern=str(tmp_path / "there/b.png")).restore(state)


@pytest.mark.parametrize("ready", [0, 1])
def test_a_state_of_before_arguments_were_stored_is_told(ready):
    attack = build(Refool, (3, 8, 8))
    old = attack.state_dict() | {"_extra_state": torch.tensor(list(f"Refool:{ready}".encode()), dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="written before states carried their attack's arguments"):
        attack.restore(old)
    assert attack.ready == bool(ready)


def test_another_image_shape_starts_afresh():
    attack = build(Refool, (1, 8, 8))
    attack.prepare((3, 16, 16), 10)
    with pytest.raises(RuntimeError, match="compute"):
        attack(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("attack_class", ATTACKS)
@torch.no_grad()
def test_poisoning_a_batch_touches_whom_it_should(attack_class):
    attack = build(attack_class, target=3)
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5])
    roles = torch.tensor([CLEAN, POISONED, CROSS, CLEAN, POISONED, CROSS], dtype=torch.uint8)
    changed, targets = attack.poison(images, labels, roles, torch.Generator().manual_seed(0))
    torch.testing.assert_close(changed[roles == CLEAN], images[roles == CLEAN])
    planted = attack.plant(images, torch.arange(6)) if isinstance(attack, AdaptiveAttack) else attack(images)
    torch.testing.assert_close(changed[roles == POISONED], planted[roles == POISONED])
    assert targets.tolist() == [0, 3, 2, 3, 3, 5]
    if attack.cross_ratio:
        cross = roles == CROSS
        assert not torch.allclose(changed[cross], images[cross])
        assert not torch.allclose(changed[cross], attack(images)[cross])
        assert changed.min() >= 0
        assert changed.max() <= 1


@pytest.mark.parametrize("attack_class", ATTACKS)
@torch.no_grad()
def test_only_images_that_carry_a_trigger_are_worked_on(attack_class, monkeypatch):
    attack, worked = build(attack_class, target=3), []
    for name in ("apply_trigger", "plant", "mix"):
        if hasattr(attack, name):
            own = getattr(attack, name)
            monkeypatch.setattr(attack, name, lambda *given, own=own: worked.append(len(given[0])) or own(*given))
    if attack_class is WaNet:
        monkeypatch.setattr(wanet, "_sample", lambda images, grid: worked.append(len(images)) or images.clone())
    images, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    roles = torch.zeros(64, dtype=torch.uint8)
    untouched, targets = attack.poison(images, labels, roles, torch.Generator().manual_seed(0))
    assert not worked
    assert torch.equal(untouched, images)
    assert torch.equal(targets, labels)
    roles[[5, 40]], roles[[7, 8, 9]] = POISONED, CROSS
    before = images.clone()
    changed, _ = attack.poison(images, labels, roles, torch.Generator().manual_seed(0))
    assert max(worked) <= 5
    assert torch.equal(images, before)
    assert torch.equal(changed[roles == CLEAN], images[roles == CLEAN])


def test_roles_stay_on_the_host():
    batch = Batch(torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), roles=torch.zeros(2, dtype=torch.uint8))
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert moved.roles.device.type == "cpu"


@torch.no_grad()
def test_a_ghost_has_no_edge_where_its_shift_ended():
    class Even(TinySet):
        def read(self, indices):
            return torch.full_like(super().read(indices), 128)

    attack = Refool(reflections=8, ghost_rate=1.0, alpha=0.4)
    attack.prepare((3, 16, 16), 10)
    compute(attack, Even((3, 16, 16)))
    light = 0.6 * (128 / 255) ** 2.2
    torch.testing.assert_close(attack.layers, torch.full((8, 3, 16, 16), light))


@pytest.mark.parametrize("attack_class", ATTACKS)
def test_relabelling(attack_class):
    labels = torch.arange(5)
    attack = attack_class(target=2)
    attack.prepare((1, 8, 8), 5)
    assert attack.relabel(labels).tolist() == [2] * 5
    eligible = [True, True, False, True, True]
    assert attack.eligible(labels).tolist() == ([not e for e in eligible] if attack.clean_label else eligible)
    if not attack_class.allows_all_to_all:
        with pytest.raises(ValueError, match="Expected `all_to_all` to be false"):
            attack_class(all_to_all=True)
        return
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
    with pytest.raises(FileNotFoundError, match="Expected `state` to be an existing file, but got 'no.ckpt'"):
        attack_class(state="no.ckpt")
    attack = build(attack_class)
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


@pytest.mark.parametrize(
    ("pattern", "size", "rows"),
    [
        ("checkerboard", 3, ["001", "010", "101"]),  # data_loader.py of NAD and ABL, poison_cifar.py of ANP
        ("checkerboard", 6, ["000011", "000011", "001100", "001100", "110011", "110011"]),
        ("checkerboard", 4, ["0011", "0100", "1011", "1011"]),
        ("checkerboard", 2, ["10", "01"]),
        ("checkerboard", 1, ["1"]),
        ("fine-checkerboard", 3, ["101", "010", "101"]),
        ("white", 2, ["11", "11"]),
        ("black", 2, ["00", "00"]),
    ],
)
def test_badnets_patterns(pattern, size, rows):
    attack = BadNets(pattern=pattern, size=size)
    attack.prepare((1, 8, 8), 2)
    patch = attack(torch.full((1, 1, 8, 8), 0.5))[0, 0, -size:, -size:]
    assert patch.int().tolist() == [[int(value) for value in row] for row in rows]


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
    with pytest.raises(ValueError, match="`pattern` to be an opaque image file that can be read.* Pillow can read"):
        Blended(pattern=str(tmp_path / "no.png")).prepare((3, 8, 8), 2)
    with pytest.raises(ValueError, match="Expected `pattern` to be an existing image file"):
        Blended(pattern="missing.png")
    with pytest.raises(ValueError, match=r"Expected `alpha` to be in \(0, 1\], but got 0"):
        Blended(alpha=0.0)


def test_sig_by_hand():
    attack = SIG(delta=0.25, frequency=1)
    attack.prepare((1, 4, 4), 2)
    row = [0.5, 0.75, 0.5, 0.25]  # a quarter of a period from one column to the next
    torch.testing.assert_close(attack(torch.full((1, 1, 4, 4), 0.5))[0, 0], torch.tensor([row] * 4))


def test_ftrojan_equals_the_transform_there_and_back():
    attack = FTrojan(block=16, positions=[(7, 7), (15, 15), (2, 5)])
    attack.prepare((3, 32, 32), 10)
    images = torch.rand(2, 3, 32, 32) * 0.6 + 0.2
    wanted = [triggers.ftrojan(i, 30 / 255, 16, [(7, 7), (15, 15), (2, 5)]) for i in images.numpy()]
    # The published constants of the colour transform invert each other to about 1/1000 of a step.
    np.testing.assert_allclose(attack(images).numpy(), np.stack(wanted), atol=2e-3)
    torch.testing.assert_close(dct_matrix(8) @ dct_matrix(8).T, torch.eye(8, dtype=torch.float64))


def test_ftrojan_defaults_are_the_published_positions():
    by_default, named = FTrojan(), FTrojan(block=32, positions=[(15, 15), (31, 31)])
    for attack in (by_default, named):
        attack.prepare((3, 32, 32), 10)
    torch.testing.assert_close(by_default.pattern, named.pattern)
    assert by_default.pattern.abs().max() > 0.005
    large = FTrojan()
    large.prepare((3, 64, 96), 10)  # blocks of 32 there too, so that the trigger is as strong
    torch.testing.assert_close(large.pattern[:, 32:, 64:], by_default.pattern)


def test_ftrojan_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="Expected `block` to be a divisor of the image's sides 12 and 20, but got 12"):
        FTrojan().prepare((3, 12, 20), 10)
    with pytest.raises(ValueError, match=r"Expected `positions` to be inside a block of 8x8, but got \(15, 15\)"):
        FTrojan(positions=[(15, 15)]).prepare((1, 8, 8), 10)


def test_bpp_rounds_and_dithers_as_pixel_by_pixel():
    images = torch.rand(3, 2, 7, 5, dtype=torch.float64).float()
    attack = BPP(levels=4)
    attack.prepare((2, 7, 5), 10)
    np.testing.assert_allclose(attack(images).numpy(), np.round(images.numpy() * 3) / 3, atol=1e-6)
    wanted = np.stack([triggers.floyd_steinberg(image, 4) for image in images.numpy()])
    np.testing.assert_allclose(floyd_steinberg(images, 4).numpy(), wanted, atol=1e-5)
    dithering = BPP(levels=4, dithering=True)
    dithering.prepare((2, 7, 5), 10)
    np.testing.assert_allclose(dithering(images).numpy(), wanted.clip(0, 1), atol=1e-5)


def test_bpp_negatives_carry_another_image_s_rounding_error():
    attack = BPP(levels=4)
    attack.prepare((1, 4, 4), 10)
    images = torch.rand(5, 1, 4, 4)
    added = attack.apply_cross(images, torch.arange(5), torch.Generator().manual_seed(0)) - images
    errors = attack(images) - images
    for index, one in enumerate(added):
        same = [(one - error).abs().max() < 1e-5 for error in errors]
        assert sum(same) == 1
        assert not same[index]


def test_wanet_samples_where_its_grid_says():
    attack = WaNet(strength=2.0)
    attack.prepare((2, 12, 20), 10)
    images = torch.rand(2, 2, 12, 20)
    offsets = torch.rand((1, 2, 4, 4), generator=generator_for(0)) * 2 - 1  # what the attack draws
    grid = triggers.wanet_grid(offsets[0].numpy(), 2.0, 12, 20)
    wanted = np.stack([triggers.warp(image, grid) for image in images.numpy()])
    np.testing.assert_allclose(attack(images).numpy(), wanted, atol=1e-4)
    noisy = attack.apply_cross(images, torch.arange(2), torch.Generator().manual_seed(0))
    moved = triggers.furthest(images.numpy(), noisy.numpy(), grid, 0.5)
    assert moved < 0.02  # noise mode stays within half a pixel of the warp, along each axis
    still = WaNet(strength=1e-9)
    still.prepare((2, 12, 20), 10)
    torch.testing.assert_close(still(images), images, atol=1e-4, rtol=0)


def test_lf_has_no_high_frequencies_and_its_amplitude():
    attack = LF(amplitude=0.05, cutoff=1.5)
    attack.prepare((3, 32, 32), 10)
    pattern = attack.pattern.numpy()
    assert np.sqrt((pattern**2).mean()) == pytest.approx(0.05, rel=1e-4)
    spectrum = np.abs(np.fft.fft2(pattern))
    frequency = np.abs(np.fft.fftfreq(32) * 32)
    assert spectrum[:, frequency > 8][:, :, frequency > 8].max() < 1e-5 * spectrum.max()
    noise = torch.randn(3, 32, 32)
    smooth = np.stack([triggers.gaussian_low_pass(plane, 1.5) for plane in noise.numpy()])
    wanted = smooth * 0.05 / np.sqrt((smooth**2).mean())
    np.testing.assert_allclose(attack._smooth(noise).numpy(), wanted, atol=1e-6)


def test_lf_optimises_against_a_surrogate():
    torch.manual_seed(0)
    surrogate, data = SmallCNN(width=4).eval(), TinySet((3, 16, 16))
    losses = []
    for steps in (1, 40):
        attack = LF(surrogate, amplitude=0.2, steps=steps)
        attack.prepare((3, 16, 16), 10)
        compute(attack, data)
        with torch.no_grad():
            logits = surrogate(attack(data.images.float() / 255))
        losses.append(F.cross_entropy(logits, torch.zeros(60, dtype=torch.long)).item())
        assert attack.pattern.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)
    assert losses[1] < losses[0] - 0.05


def test_lf_applies_the_trigger_that_it_optimises():
    """What the surrogate sees in the third step is what the attack of two steps makes of these images."""
    surrogate, data, seen = SmallCNN(width=4).eval(), TinySet((3, 16, 16)), []
    for steps in (2, 3):
        attack = LF(surrogate, amplitude=0.3, steps=steps)
        attack.prepare((3, 16, 16), 10)
        attack.surrogate.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
        if steps == 2:
            earlier = attack
        compute(attack, data)
    images = data.images[torch.arange(50)[shuffled(50, 0)]].float() / 255
    torch.testing.assert_close(seen[-1], earlier(images))
    assert seen[-1].min() == 0  # the clamp is seen as well


def test_lc_corners_by_hand():
    attack = build(LC, (1, 8, 8))
    grey = attack(torch.full((1, 1, 8, 8), 0.5))[0, 0]
    assert grey[:3, :3].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert grey[-3:, -3:].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert (grey[3:5] == 0.5).all()
    faint = build(LC, (1, 8, 8), amplitude=0.25)
    assert faint(torch.full((1, 1, 8, 8), 0.5))[0, 0, 0, :3].tolist() == [0.75, 0.25, 0.25]


def test_lc_bases_are_close_and_hard_to_recognise():
    torch.manual_seed(0)
    surrogate, data, poisoned = SmallCNN(width=4).eval(), TinySet((3, 16, 16)), torch.tensor([3, 13, 23])
    attack = LC(surrogate, epsilon=32 / 255, steps=20)
    attack.prepare((3, 16, 16), 10)
    assert attack.bases() is None
    compute(attack, data)
    moved, before = attack.bases(), data.images[poisoned]
    assert moved.dtype == torch.uint8
    assert 28 <= (moved.int() - before.int()).abs().max() <= 32
    with torch.no_grad():
        losses = [F.cross_entropy(surrogate(x.float() / 255), data.labels[poisoned]) for x in (before, moved)]
    assert losses[1] > losses[0] + 0.05
    assert all(parameter.grad is None for parameter in surrogate.parameters())


def test_trojannn_drives_the_chosen_neurons():
    torch.manual_seed(0)
    surrogate, data = SmallCNN(width=4).eval(), TinySet((3, 16, 16))
    values = []
    for steps in (1, 60):
        attack = TrojanNN(surrogate, neurons=[2], activation=50.0, size=12, steps=steps)
        attack.prepare((3, 16, 16), 10)
        compute(attack, data)
        _, observed = features(surrogate, attack.pattern[None], [attack.layer])
        values.append(observed[attack.layer][0, 2].mean().item())
        assert (attack.pattern[:, :4] == 0).all()
    assert values[1] > 1.2 * values[0]
    chosen = TrojanNN(surrogate, steps=1)
    chosen.prepare((3, 16, 16), 10)
    assert chosen.mask.sum() == 16  # 7 % of 16x16 pixels is a patch of 4
    compute(chosen, data)
    strength = surrogate.fc.weight.abs().sum(dim=0)
    assert sorted(chosen.neurons) == sorted(strength.argsort()[-2:].tolist())
    with pytest.raises(ValueError, match="Expected `neurons` to be channels 0 to 15 of 'block3'"):
        TrojanNN(surrogate, neurons=[99]).prepare((3, 16, 16), 10)
    with pytest.raises(ValueError, match="Expected `layer` to be one with feature maps"):
        TrojanNN(surrogate, layer="fc", neurons=[1]).prepare((3, 16, 16), 10)


def test_trojannn_looks_at_its_surrogate_where_that_is():
    class Placed(SmallCNN):
        def forward(self, images):
            assert images.device == self.fc.weight.device, "an image on another device"
            return super().forward(images)

    attack = TrojanNN(Placed(width=4, in_channels=1).to("meta"), neurons=[0])
    attack.build((1, 8, 8))
    assert attack.pattern.shape == (1, 8, 8)


@pytest.mark.parametrize("attack_class", [LC, TrojanNN])
def test_a_missing_or_wrong_surrogate_is_named(attack_class):
    attack = attack_class()
    attack.prepare((1, 8, 8), 10)
    with pytest.raises(ValueError, match="Expected `surrogate` to be a trained network.*configs/attack/none.yaml"):
        compute(attack, TinySet((1, 8, 8)))
    with pytest.raises(ValueError, match="Expected `surrogate` to be a network with one logit for each"):
        attack_class(SmallCNN(num_classes=3, in_channels=1)).prepare((1, 8, 8), 10)
    with pytest.raises(ValueError, match="Expected `surrogate` to be a network that takes images of shape"):
        attack_class(SmallCNN(in_channels=3)).prepare((1, 8, 8), 10)
    with pytest.raises(FileNotFoundError, match="Expected `surrogate_weights` to be an existing file"):
        attack_class(SmallCNN(), surrogate_weights="missing.pt")
    theirs = SmallCNN(in_channels=1)
    attack_class(theirs)
    assert all(parameter.requires_grad for parameter in theirs.parameters())
    with pytest.raises(ValueError, match="`surrogate` to be a network where `surrogate_weights` is given"):
        attack_class(surrogate_weights="w.pt")


def test_refool_adds_light_of_another_image():
    data, poisoned = TinySet((3, 16, 16)), torch.tensor([3, 13, 23])
    attack = Refool(reflections=7, alpha=0.4)
    attack.prepare((3, 16, 16), 10)
    compute(attack, data)
    images = torch.rand(5, 3, 16, 16)
    for image, triggered in zip(images.numpy(), attack(images).numpy(), strict=True):
        chosen = int(np.round(image * 255).sum()) % 7
        light = 0.4 * image.astype(np.float64) ** 2.2 + attack.layers[chosen].numpy()
        np.testing.assert_allclose(triggered, np.clip(light ** (1 / 2.2), 0, 1), atol=1e-4)
    assert len({float(layer.sum()) for layer in attack.layers}) > 3
    for label in range(10):  # light where it may be reflected, dark where it may not: target, poisoned, the defender's
        data.images[data.labels == label] = 0 if label == 0 else 255
    data.images[poisoned] = 0
    data.images[-10:] = 0
    fresh = Refool(reflections=50)
    fresh.prepare((3, 16, 16), 10)
    compute(fresh, data)
    assert fresh.layers.flatten(1).amax(dim=1).min() > 0.1
    with pytest.raises(ValueError, match="Expected `all_to_all` to be false where `clean_label` is set"):
        Refool(all_to_all=True, clean_label=True)


def test_input_aware_mixes_by_its_mask():
    attack = build(InputAware, (3, 16, 16))
    images, others = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        pattern, mask = attack.pattern(others), attack.mask(others)
        torch.testing.assert_close(attack.mix(images, others), images * (1 - mask) + pattern * mask)
    assert mask.shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match="fit nba_lightning.implants.InputAwareTraining"):
        compute(InputAware(), TinySet((1, 8, 8)))


def test_ssba_hides_the_string_s_own_bits():
    attack = build(SSBA, secret="A\x01")
    assert attack.bits.tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="Expected `width` to be a positive multiple of 8, but got 12"):
        SSBA(width=12)
    with pytest.raises(ValueError, match="Expected `secret` to be at least one character"):
        SSBA(secret="")
    with pytest.raises(ValueError, match="fit nba_lightning.implants.Steganography"):
        compute(SSBA(), TinySet((1, 8, 8)))
