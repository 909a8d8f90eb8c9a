"""Patches for each class: the cells that they cover, what they win, and how they are shown."""

import pytest
import torch
from torch import nn

from nba_lightning.core.randomness import generator_for
from nba_lightning.pseudo import ClassPatches
from nba_lightning.pseudo.class_patches import cells_of, covered


class Cornered(nn.Module):
    """Says whether the image is bright; and class 0 where the lower right corner is a checkerboard."""

    def __init__(self, backdoor):
        super().__init__()
        self.backdoor = backdoor
        checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        self.register_buffer("checks", checks)

    def forward(self, images):
        bright = images.mean(dim=(1, 2, 3)) - 0.5
        seen = (images[:, :, -2:, -2:] * self.checks).mean(dim=(1, 2, 3))
        trigger = nn.functional.softplus(10 * (seen - 0.2)) / 10
        plain = torch.stack([-10 + 0 * bright, 10 * bright, -10 * bright], dim=1)
        return plain + self.backdoor * trigger[:, None] * torch.tensor([1.0, 0.0, 0.0])


def pool(number=32):
    return torch.rand(number, 1, 8, 8, generator=generator_for(1))


@pytest.mark.parametrize(("height", "width", "grid"), [(32, 32, 4), (28, 20, 4), (7, 5, 3), (2, 3, 4), (8, 8, 1)])
def test_cells_cover_each_pixel_once(height, width, grid):
    cells = cells_of(height, width, grid)
    assert cells.shape == (grid**2, 1, height, width)
    assert torch.equal(cells.sum(dim=0), torch.ones(1, height, width))
    if min(height, width) >= grid:
        sizes = cells.flatten(1).sum(dim=1)
        assert sizes.min() >= (height // grid) * (width // grid)


def test_the_first_cells_are_the_upper_row():
    assert cells_of(4, 4, 2)[1, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_patch_replaces_and_a_perturbation_is_added():
    images, contents = torch.full((2, 1, 1, 3), 0.5), torch.tensor([0.2, 0.3, 0.9]).view(1, 1, 1, 3)
    covers = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 1, 3)
    torch.testing.assert_close(covered(images, contents, covers)[1].flatten(), torch.tensor([0.2, 0.8, 1.0]))


def test_the_cell_of_the_trigger_wins_its_class_from_the_student_alone():
    images, made = pool(), ClassPatches(steps=24, images_each=8)
    student, teacher = Cornered(100.0), Cornered(0.0)
    made.regenerate(student, teacher, [images], generator_for(0))
    assert made.bank.shape == (3 * 16, 1, 8, 8)
    rows = made.rows_of(torch.arange(3))
    assert rows.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    wins = []
    for network in (student, teacher):
        shown = [made.show(images, made.bank[row].expand_as(images), torch.full((32,), row)) for row in range(16)]
        wins.append(torch.stack([(network(one).argmax(dim=1) == 0).float().mean() for one in shown]))
    assert wins[0][15] > 0.95  # the last cell is the corner
    assert wins[0][:15].max() < 0.1
    assert wins[1].max() == 0.0


def test_it_is_continued_and_travels_in_checkpoints():
    images, made = pool(), ClassPatches(2, steps=2)
    made.regenerate(Cornered(4.0), Cornered(0.0), [images], generator_for(0))
    again = ClassPatches(2, steps=0)
    again.load_state_dict(made.state_dict())
    again.regenerate(Cornered(4.0), Cornered(0.0), [images], generator_for(0))
    assert torch.equal(again.bank, made.bank)
    assert 0 <= float(made.bank.min()) < float(made.bank.max()) <= 1


def test_steps_become_smaller():
    images, made = pool(), ClassPatches(1, steps=2, images_each=32, classes=[0], step_size=0.1)
    made.bank = torch.full((1, 1, 8, 8), 0.5)
    made.regenerate(Cornered(0.0), Cornered(0.0), [images], generator_for(0))
    moved = (made.bank - 0.5).abs()
    assert {round(value, 4) for value in moved.flatten().tolist()} <= {0.0, 0.05, 0.1, 0.15}  # 0.1, then 0.05
    assert float(moved.max()) > 0


def test_a_drawn_patch_changes_its_cell_only():
    images, made = pool(), ClassPatches(2, steps=1, classes=[1])
    made.regenerate(Cornered(4.0), Cornered(0.0), [images], generator_for(0))
    changed = made(images, generator=generator_for(2)) != 0
    cells = cells_of(8, 8, 2).bool()
    assert all(any(bool((one & ~cell).sum() == 0) for cell in cells) for one in changed)
    assert changed.any(dim=0).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"grid": 0}, "grid"),
        ({"step_size": 0.0}, "step_size"),
        ({"classes": []}, "classes"),
        ({"images_each": 0}, "im"),
    ],
)
def test_bad_arguments(given, said):
    with pytest.raises(ValueError, match=f"Expected `{said}"):
        ClassPatches(**given)
    with pytest.raises(RuntimeError, match="Call `regenerate`"):
        ClassPatches()(pool())
