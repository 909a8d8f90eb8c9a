"""Families of synthetic triggers: what they draw, that a draw is one trigger, and what the search keeps."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from nba_lightning.core.randomness import generator_for
from nba_lightning.pseudo import (
    ClassPerturbations,
    Together,
    TriggerFamilies,
    UniversalPerturbations,
    per_class,
)
from nba_lightning.pseudo import families as module
from nba_lightning.pseudo.families import (
    BlendImage,
    BlendNoise,
    Frequencies,
    Patch,
    Quantisation,
    Sinusoid,
    SmoothField,
    Warp,
    all_families,
)

SHAPES = [(3, 32, 32), (1, 8, 8), (1, 28, 20), (4, 5, 5), (3, 96, 64)]


def pool(shape, number=12):
    return torch.rand(number, *shape, generator=generator_for(1))


@pytest.mark.parametrize("family", all_families(), ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_family_takes_any_size_and_gives_the_same_draws_for_the_same_seed(family, shape):
    images = pool(shape)
    first, second = (family.draw(12, images, generator_for(2)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {len(value) for value in first.values()} == {12}
    triggered = family.apply(images, first)
    assert triggered.shape == images.shape
    assert torch.isfinite(triggered).all()
    changed = (triggered - images).abs().flatten(1).amax(dim=1) > 1e-3
    assert changed.float().mean() > 0.7  # a draw may be invisible, most are not


@pytest.mark.parametrize("family", all_families(), ids=repr)
def test_a_draw_is_one_trigger_whatever_image_it_is_put_on_and_in_whatever_company(family):
    images = pool((3, 16, 16))
    draws = family.draw(3, images, generator_for(2))
    alone = {name: value[[1]] for name, value in draws.items()}
    twice = {name: value[[1, 0, 1]] for name, value in draws.items()}
    torch.testing.assert_close(family.apply(images[[5]], alone)[0], family.apply(images[[2, 5, 5]], twice)[2])


def test_draws_are_what_they_are_called():
    images, generator = pool((3, 32, 32)), generator_for(3)
    patch = Patch().draw(3000, images, generator)["mask"]
    covered = patch.amax(dim=3).sum(dim=(1, 2)) / 32, patch.amax(dim=2).sum(dim=(1, 2)) / 32
    assert all(1 / 32 <= float(side.min()) <= float(side.max()) <= 12 / 32 for side in covered)
    assert patch.amax(dim=0).min() == 1.0  # anywhere
    for family in (BlendImage(), BlendNoise()):
        share = family.draw(200, images, generator)["share"]
        assert 0.05 <= float(share.min()) < 0.1 < 0.25 < float(share.max()) <= 0.3
    for family, low, high in ((SmoothField(), 0.05, 0.3), (Sinusoid(), 0.0, 0.2), (Frequencies(), 0.02, 0.2)):
        peaks = family.draw(200, images, generator)["field"].abs().amax(dim=(1, 2, 3))
        assert low * 0.9 <= float(peaks.min()) <= float(peaks.max()) <= high + 1e-6
    smooth, wave = (one.draw(50, images, generator)["field"] for one in (SmoothField(), Frequencies()))
    roughness = [field.diff(dim=3).abs().mean() / field.abs().mean() for field in (smooth, wave)]
    assert roughness[0] < 0.3 < roughness[1]
    levels = Quantisation().apply(images, {"levels": torch.full((12, 1, 1, 1), 3.0), "dither": torch.zeros(())})
    assert torch.unique(levels).tolist() == [0.0, 0.5, 1.0]
    grid = Warp().draw(200, images, generator)["grid"]
    still = torch.nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 3, 32, 32], align_corners=True)
    moved = (grid - still).abs().amax(dim=(1, 2, 3)) / 2  # as a share of the image
    assert 1 / 70 <= float(moved.min()) <= float(moved.max()) <= 1 / 11


def test_families_share_no_constant_and_no_code_with_the_attacks():
    root = Path(module.__file__).parent
    for path in root.glob("*.py"):
        tree = ast.parse(path.read_text())
        targets = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not any("attacks" in target for target in targets), path.name


class Fooled(nn.Module):
    """The brighter the top left corner, the more it says class 1; of dark corners it says what Steady says."""

    def forward(self, images):
        corner = images[:, :, :4, :4].mean(dim=(1, 2, 3))
        return torch.stack([1 + 0 * corner, 8 * corner - 1], dim=1)


class Steady(nn.Module):
    def forward(self, images):
        return torch.tensor([[1.0, -1.0]]).expand(len(images), -1)


def test_the_search_keeps_the_draws_on_which_student_and_teacher_disagree_most():
    made = TriggerFamilies([Patch()], candidates=200, kept=3, images_each=2)
    images = torch.zeros(8, 3, 16, 16)
    made.regenerate(Fooled(), Steady(), [images + 0.5 * (torch.arange(16) > 8)], generator_for(0))
    (found,) = made.found
    assert len(found["mask"]) == 3
    fresh = Patch().draw(200, images, generator_for(1))
    corners = [(one["mask"] * one["pattern"])[:, :, :4, :4].mean(dim=(1, 2, 3)) for one in (found, fresh)]
    assert corners[0].min() > corners[1].quantile(0.95)
    assert corners[0].min() > 5 * corners[1].mean()


def test_found_and_fresh_draws_share_the_images_and_every_family_has_its_turn():
    made = TriggerFamilies([Sinusoid(), SmoothField()], candidates=2, kept=1, found_share=0.5)
    images = torch.full((12, 3, 8, 8), 0.5)
    made.regenerate(Steady(), Steady(), [images], generator_for(0))
    shifts = made(images, generator=generator_for(1))
    for number, draws in enumerate(made.found):
        mine = shifts[number::2]
        torch.testing.assert_close(mine[:3], draws["field"].expand(3, -1, -1, -1))
        assert all(not torch.allclose(one, draws["field"][0]) for one in mine[3:])
    again = TriggerFamilies([Sinusoid(), SmoothField()])
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again.found[1]["field"], made.found[1]["field"])


def test_a_search_decides_by_what_all_processes_see():
    made, seen = TriggerFamilies([Patch(), Sinusoid()], candidates=6, kept=1), []
    images = torch.rand(8, 3, 16, 16)

    def of_all(apart):
        seen.append(apart)
        return (torch.arange(6) == 4).float()  # another process saw them disagree on the fifth

    made.regenerate(Fooled(), Steady(), [images], generator_for(0), of_all)
    assert [one.shape for one in seen] == [(6,)] * 2
    generator = generator_for(0)
    first = Patch().draw(6, images, generator)
    torch.testing.assert_close(made.found[0]["pattern"], first["pattern"][4:5])


def test_every_image_keeps_what_is_its_own():
    class Unchanged(Sinusoid):
        def apply(self, images, parameters):
            return images.clone()

    made = TriggerFamilies([Unchanged(), Unchanged(), Unchanged()], candidates=2, kept=1)
    images = torch.rand(9, 3, 8, 8)
    made.regenerate(Steady(), Steady(), [images], generator_for(0))
    assert not made(images, generator=generator_for(1)).any()


def test_a_search_needs_no_second_draw_without_candidates():
    made = TriggerFamilies(candidates=0, kept=0)
    made.regenerate(None, None, [])  # asks nobody
    assert made(torch.rand(5, 1, 8, 8)).shape == (5, 1, 8, 8)


def test_class_perturbations_make_the_student_fall_and_leave_the_teacher():
    torch.manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(16, 3, 8, 8)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)) for _ in range(2))
    for network in (student, teacher):
        network[1].weight.data *= 5
    made = ClassPerturbations((0.02, 0.1), steps=20)
    made.regenerate(student, teacher, [images], generator_for(0))
    assert made.bank.shape == (8, 3, 8, 8)
    sizes = made.bank.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(sizes, torch.tensor([0.02] * 4 + [0.1] * 4), atol=1e-4, rtol=0)
    falls, stays, fell = [], [], []
    for k in range(4):
        inputs = (images + made.bank[4 + k]).clamp(0, 1)
        falls.append((student(inputs).argmax(1) == k).float().mean())
        fell.append((student(images).argmax(1) == k).float().mean())
        stays.append((teacher(inputs).argmax(1) == teacher(images).argmax(1)).float().mean())
    assert sum(falls) / 4 > 0.6 > 0.26 > sum(fell) / 4
    assert sum(stays) / 4 > 0.75
    for p in (student, teacher):
        assert all(parameter.grad is None for parameter in p.parameters())
    again = ClassPerturbations((0.02, 0.1))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.bank, made.bank)


def test_class_perturbations_follow_the_gradients_of_all_processes():
    images, seen = torch.rand(16, 3, 8, 8), []
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    made = ClassPerturbations((0.05,), steps=3)
    made.regenerate(network, network, [images], generator_for(0), lambda g: seen.append(g) or torch.zeros_like(g))
    assert [one.shape for one in seen] == [(4, 3, 8, 8)] * 3
    still = ClassPerturbations((0.05,), steps=0)
    still.regenerate(network, network, [images], generator_for(0))
    torch.testing.assert_close(made.bank, still.bank)  # no step was made


def test_perturbations_are_crafted_a_few_at_a_time_and_alike(monkeypatch):
    torch.manual_seed(0)
    images, sizes = torch.rand(16, 3, 8, 8), []
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)) for _ in range(2))
    student.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))

    def bank(at_once):
        monkeypatch.setattr(per_class, "AT_ONCE", at_once)
        made = ClassPerturbations((0.02, 0.1), steps=3, images_each=7)
        sizes.clear()
        made.regenerate(student, teacher, [images], generator_for(0))
        return made.bank

    whole = bank(1000)
    assert max(sizes) == 70
    torch.testing.assert_close(bank(21), whole)
    assert max(sizes) == 21
    torch.testing.assert_close(bank(1), whole)  # no less than one perturbation
    assert max(sizes) == 7


def test_together_shares_a_batch_out():
    one, two = UniversalPerturbations(1), UniversalPerturbations(1)
    one.bank, two.bank = torch.full((1, 1, 2, 2), 0.1), torch.full((1, 1, 2, 2), 0.2)
    shifts = Together([one, two], [3, 1])(torch.zeros(8, 1, 2, 2))
    torch.testing.assert_close(shifts[:, 0, 0, 0], torch.tensor([0.1] * 6 + [0.2] * 2))
    with pytest.raises(ValueError, match="Expected `shares` to be 2 shares"):
        Together([one, two], [1.0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="Expected `families` to be at least one family"):
        TriggerFamilies([])
    with pytest.raises(ValueError, match=r"Expected `kept` to be in \[1, 4\], but got 5"):
        TriggerFamilies(candidates=4, kept=5)
    with pytest.raises(ValueError, match=r"Expected `sizes` to be in \(0, 1\], but got 0"):
        ClassPerturbations((0.0,))
