"""The stratified split that holds images out: at random within each class, the same on every machine."""

import pytest
import torch

from nba_lightning.data.partition import draw_partition, stratified_split


def ranks_held_out(labels, label, **kwargs):
    """Which images of a class are held out, counted within the class."""
    _, held_out = stratified_split(labels, **{"fraction": 0.25, "seed": 0, **kwargs})
    members = (labels == label).nonzero().flatten()
    return torch.isin(members, held_out).nonzero().flatten().tolist()


def test_a_split_divides_all_images_class_by_class():
    labels = torch.tensor([0] * 40 + [1] * 12 + [2] * 7)
    train, held_out = stratified_split(labels, 0.25, seed=3)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(59))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(held_out, held_out.sort().values)
    assert labels[held_out].bincount().tolist() == [10, 3, 2]


def test_a_split_is_drawn_at_random_and_by_the_seed_alone():
    labels = torch.arange(4).repeat(400)
    torch.manual_seed(1)
    first = ranks_held_out(labels, 2)
    torch.manual_seed(2)
    assert first == ranks_held_out(labels, 2)
    assert first != ranks_held_out(labels, 2, seed=1)
    assert first != ranks_held_out(labels, 1)  # classes are drawn independently
    assert len(first) == 100
    # Neither the first images of the class nor the last: 25 of each 100 on average, at most 4 deviations off.
    assert all(8 <= sum(low <= rank < low + 100 for rank in first) <= 42 for low in range(0, 400, 100))


def test_a_split_does_not_depend_on_the_order_of_the_classes():
    mixed = torch.arange(5).repeat(20)
    for other in (mixed.sort().values, mixed.flip(0), torch.cat([mixed[mixed == 3], mixed[mixed != 3]])):
        assert all(ranks_held_out(mixed, label) == ranks_held_out(other, label) for label in range(5))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_a_split_leaves_an_image_of_each_class_to_train_on(fraction):
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    train, held_out = stratified_split(labels, fraction, seed=0)
    assert labels[train].unique().tolist() == [0, 1, 2]
    assert len(held_out) == {0.0: 0, 0.5: 3, 0.99: 3}[fraction]


def test_a_split_refuses_what_is_none():
    with pytest.raises(ValueError, match=r"`fraction` to be in \[0, 1\), but got 1"):
        stratified_split(torch.arange(3), 1.0, seed=0)
    with pytest.raises(ValueError, match="`labels` to be class numbers of shape"):
        stratified_split(torch.eye(3).long(), 0.5, seed=0)
    with pytest.raises(ValueError, match="`labels` to be of at least one image, but got none"):
        stratified_split(torch.empty(0).long(), 0.5, seed=0)


def test_poisoned_and_clean_images_are_drawn_at_random_and_are_nobody_else_s():
    labels = torch.arange(4).repeat(400)
    part = draw_partition(labels, labels != 0, 0.2, 0.25, 0.5, seed=0, cross_ratio=0.5)
    defender = torch.cat([part.clean, part.validation])
    for drawn, number, of in ((part.poisoned, 320, 1200), (part.cross, 160, 1280), (defender, 400, 1120)):
        assert len(drawn.unique()) == len(drawn) == number
        # Neither the first images nor the last: each quarter has its share, at most five deviations off.
        spread = 5 * (number / 4 * (1 - number / of)) ** 0.5
        quarters = [int(((drawn >= low) & (drawn < low + 400)).sum()) for low in range(0, 1600, 400)]
        assert all(abs(count - number / 4) <= spread for count in quarters), quarters
    parts = torch.cat([part.poisoned, part.cross, defender])
    assert len(parts.unique()) == len(parts)
    assert (labels[part.poisoned] != 0).all()
    assert labels[part.clean].bincount().tolist() == labels[part.validation].bincount().tolist() == [50] * 4
    everything = torch.cat([part.training, part.validation]).sort().values
    assert torch.equal(everything, torch.arange(1600))
    for one in (part.training, part.poisoned, part.cross, part.clean, part.validation):
        assert torch.equal(one, one.sort().values)


def test_another_seed_draws_other_images():
    labels = torch.arange(4).repeat(100)
    first, second = (draw_partition(labels, labels != 0, 0.1, 0.1, 0.2, seed, cross_ratio=1.0) for seed in (0, 1))
    assert not any(torch.equal(getattr(first, name), value) for name, value in vars(second).items())


def test_the_published_partition_is_still_drawn():
    """The figures of the benchmarks belong to these draws."""
    labels = torch.arange(10).repeat(200)
    part = draw_partition(labels, labels != 0, 0.1, 0.05, 0.1, seed=0)
    assert part.poisoned[:5].tolist() == [4, 12, 15, 21, 22]
    assert part.clean[:5].tolist() == [13, 51, 98, 111, 121]
    assert part.validation[:5].tolist() == [42, 185, 206, 408, 497]
