"""The strongest rate that clean accuracy allows."""

import math

import pytest
from torch import nn

from nba_lightning.core.paired import Paired
from nba_lightning.training.sweep import (
    RATES,
    USUAL_RATE,
    allowed_loss,
    gentler_rates,
    keeps,
    may_replace,
    most_accurate,
    next_rate,
    strongest_rate,
    teachers_latent_share,
    teachers_loss,
    teachers_mixed_share,
    usual_optimizer,
)


def test_the_largest_rate_that_keeps_the_accuracy_is_taken_wherever_it_stands():
    accuracies = {0.1: 0.79, 0.01: 0.81, 1.0: 0.5, 0.3: 0.6}
    assert strongest_rate(accuracies, 0.8, 1000) == 0.1
    assert strongest_rate(dict(reversed(accuracies.items())), 0.8, 1000) == 0.1


def test_a_gap_below_a_rate_that_keeps_it_does_not_matter():
    assert strongest_rate({0.01: 0.8, 0.1: 0.2, 1.0: 0.8}, 0.8, 1000) == 1.0


def test_where_none_keeps_it_the_one_that_lost_least_is_taken():
    assert strongest_rate({0.01: 0.4, 0.1: 0.5, 1.0: 0.1}, 0.9, 1000) == 0.1
    assert strongest_rate({0.1: 0.6, 0.01: 0.8, 1.0: 0.5}, 0.9, 1000) == 0.01


def test_where_none_keeps_it_a_weaker_one_that_lost_hardly_less_is_not_taken():
    accuracies = {0.025: 0.748, 0.006: 0.748, 0.003: 0.752, 0.1: 0.684}  # of 250 images: a standard error is 0.0272
    assert strongest_rate(accuracies, 0.812, 250) == 0.025
    assert strongest_rate({0.003: 0.752, 0.025: 0.7252}, 0.812, 250) == 0.025
    assert strongest_rate({0.003: 0.752, 0.025: 0.7244}, 0.812, 250) == 0.003
    assert strongest_rate({0.003: 0.74, 0.025: 0.752}, 0.812, 250) == 0.025


def test_of_equally_accurate_ones_the_gentlest_is_taken():
    assert most_accurate({0.1: 0.78, 0.025: 0.81, 0.05: 0.81}) == 0.025
    assert most_accurate({0.1: 0.82, 0.025: 0.81, 0.05: 0.81}) == 0.1


@pytest.mark.parametrize(("baseline", "images"), [(0.5, 110), (0.7, 130), (0.6, 150)])
def test_few_images_allow_a_standard_error(baseline, images):
    right, total = baseline * images + 2, images + 4
    expected = math.sqrt((right * (total - right)) / total**2) / math.sqrt(total)
    assert allowed_loss(baseline, images, 0.01) == pytest.approx(expected)
    assert keeps(baseline - expected + 1e-6, baseline, images, 0.01)
    assert not keeps(baseline - expected - 1e-6, baseline, images, 0.01)


def test_many_images_allow_what_the_owner_allows():
    assert allowed_loss(0.9, 1_000_000) == 0.05
    assert allowed_loss(0.9, 1_000_000, 0.01) == 0.01
    assert keeps(0.85, 0.9, 1_000_000)
    assert not keeps(0.849, 0.9, 1_000_000)
    assert strongest_rate({0.1: 0.86, 0.01: 0.89}, 0.9, 10_000, max_loss=0.02) == 0.01


def test_a_few_images_that_are_all_right_are_not_certain():
    assert 18 / 19 < 1 - 0.05  # one of nineteen is more than the owner allows
    assert keeps(18 / 19, 1.0, 19)
    assert not keeps(0.94, 1.0, 100_000)


@pytest.mark.parametrize("images", [8, 20, 39, 40, 57])
def test_as_many_may_be_lost_as_the_guard_calls_chance(images):
    assert keeps(1.0 - 5 / images, 1.0, images, 0.0875)
    assert not keeps(1.0 - 6 / images, 1.0, images, 0.0875)
    assert not Paired(images, 5, 0).beyond_chance()
    assert Paired(images, 6, 0).beyond_chance()


def test_a_better_network_keeps_its_accuracy():
    assert keeps(1.0, 0.2, 1000)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: strongest_rate({}, 0.8, 10), "Expected `accuracies` to be of at least one rate, but got none"),
        (lambda: strongest_rate({0.1: 80.0}, 0.8, 10), r"Expected `accuracy` to be in \[0, 1\], but got 80"),
        (lambda: allowed_loss(80, 10), r"Expected `baseline` to be in \[0, 1\], but got 80"),
        (lambda: allowed_loss(0.8, 0), "Expected `images` to be at least 1, but got 0"),
    ],
)
def test_what_cannot_be_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_optimiser_follows_the_kind_of_the_network():
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    plain = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    assert [usual_optimizer(one) for one in (depthwise, plain, grouped)] == ["AdamW", "SGD", "SGD"]
    for norm, wanted in ((nn.LayerNorm(4), "AdamW"), (nn.GroupNorm(2, 4), "AdamW"), (nn.BatchNorm2d(4), "SGD")):
        assert usual_optimizer(nn.Sequential(plain, norm)) == wanted
    assert all(USUAL_RATE[kind] in rates and list(rates) == sorted(rates)[::-1] for kind, rates in RATES.items())


@pytest.mark.parametrize("best", [*RATES["SGD"], None])
def test_three_fits_find_the_strongest_of_seven_rates(best):
    kept = {}
    while (rate := next_rate(RATES["SGD"], kept)) is not None:
        assert rate not in kept
        kept[rate] = best is not None and rate <= best
    assert len(kept) == 3
    assert max((rate for rate, good in kept.items() if good), default=None) == best


@pytest.mark.parametrize("best", [*RATES["SGD"], None])
def test_between_the_strongest_and_the_weakest_that_was_tried_no_rate_is_left_out(best):
    kept = {}
    while (rate := next_rate(RATES["SGD"], kept)) is not None:
        kept[rate] = best is not None and rate <= best
    strongest = best or min(kept)
    more = gentler_rates(RATES["SGD"], kept, strongest)
    assert more == ([0.05] if strongest >= 0.1 else [])
    between = [rate for rate in RATES["SGD"] if min(kept) <= rate <= strongest]
    assert set(between) <= {*kept, *more}


def test_one_rate_is_tried_once():
    assert next_rate((0.1,), {}) == 0.1
    assert next_rate((0.1,), {0.1: True}) is None
    assert next_rate((0.1,), {0.1: False}) is None
    assert next_rate((0.1, 0.2), {0.1: True, 0.2: False}) is None


def test_the_teacher_may_lose_more_since_the_student_learns_back():
    assert teachers_loss(0.04) == pytest.approx(0.07)
    assert teachers_loss(0.8) == 1.0


def test_a_teacher_of_few_images_sees_half_of_them_mixed():
    assert [teachers_mixed_share(images) for images in (10, 199, 200, 2250)] == [0.5, 0.5, 0.0, 0.0]
    assert [teachers_latent_share(images) for images in (10, 999, 1000, 2250)] == [0.0, 0.0, 1 / 3, 1 / 3]


@pytest.mark.parametrize(
    ("now", "before", "may"), [(0.76, 0.8, True), (0.74, 0.8, False), (0.73, 0.74, True), (0.72, 0.74, False)]
)
def test_who_takes_a_place_may_lose_what_the_owner_can_do_without_or_chance_since(now, before, may):
    assert may_replace(now, before, 0.8, 1000, 0.05) is may  # a standard error is 1.4 points


def test_of_few_images_two_more_may_be_chance_and_three_are_not():
    assert may_replace(9 / 20, before=11 / 20, baseline=17 / 20, images=20)
    assert not may_replace(8 / 20, before=11 / 20, baseline=17 / 20, images=20)
