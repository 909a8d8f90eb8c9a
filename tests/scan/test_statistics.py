"""Decision rules hold their level where there is nothing to find, and find what was put there."""

import pytest
import torch
from scipy import stats

from nba_lightning.scan.statistics import Conformal, StudentisedMaximum, logarithms, studentised


def lognormal(networks, classes=10, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn((networks, classes), generator=generator, dtype=torch.float64)).exp()


def smallest(rule, statistics):
    return torch.tensor([min(rule(row)) for row in statistics.tolist()])


@pytest.mark.parametrize("classes", [3, 10])
def test_five_percent_alarm_on_five_percent_of_networks_without_an_outlier(classes):
    found = smallest(StudentisedMaximum(), lognormal(2000, classes, seed=1))
    for level in (0.01, 0.05, 0.2):
        share = float((found <= level).double().mean())
        assert share == pytest.approx(level, abs=4 * (level * (1 - level) / 2000) ** 0.5)


def test_it_is_grubbs_test_on_logarithms():
    found = studentised(logarithms(lognormal(20).tolist()))
    largest = found.amax(dim=1)
    # Grubbs 1969: one-sided critical value from Student's t at level / K, a bound that is tight for small levels.
    critical = []
    for level in (0.01, 0.05):
        t = stats.t.ppf(1 - level / 10, 8)
        critical.append(9 / 10**0.5 * (t**2 / (8 + t**2)) ** 0.5)
    rule = StudentisedMaximum(draws=200_000)
    for row, z in zip(lognormal(20).tolist(), largest.tolist(), strict=True):
        p = min(rule(row))
        assert (p <= 0.05) == (z >= critical[1]) or p == pytest.approx(0.05, abs=0.003)
        assert (p <= 0.01) == (z >= critical[0]) or p == pytest.approx(0.01, abs=0.001)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_planted_outlier_is_found_whatever_the_unit(scale):
    statistics = lognormal(200, seed=2)
    statistics[:, 7] *= 8
    rule = StudentisedMaximum()
    found = torch.tensor([rule(row) for row in (scale * statistics).tolist()])
    assert float((found.amin(dim=1) <= 0.05).double().mean()) > 0.9
    assert bool((found.argmin(dim=1) == 7).double().mean() > 0.99)


def test_equal_statistics_and_small_ones_are_no_outliers():
    rule = StudentisedMaximum(draws=500)
    assert rule([2.0] * 5) == [1.0] * 5
    assert rule([2.0, 2.0 + 1e-9, 2.0]) == [1.0] * 3
    low = rule([1.0, 1.01, 1.02, 1.03, 1.04, 1e-6])
    assert low[5] == 1.0
    # A class that nothing reaches counts as hard as the hardest that is reached.
    assert rule([1.0, 2.0, 4.0, -3.0]) == rule([1.0, 2.0, 4.0, 1.0])


def test_seed_and_draws_are_the_whole_randomness():
    row = lognormal(1)[0].tolist()
    torch.manual_seed(1)
    first = StudentisedMaximum(draws=300, seed=4)(row)
    torch.manual_seed(2)
    assert StudentisedMaximum(draws=300, seed=4)(row) == first
    assert min(StudentisedMaximum(draws=300)([1, 1.1, 1.2, 1.3, 1e9])) == 1 / 301


def test_conformal_holds_its_level_under_heavy_tails_and_natural_outliers():
    """Where the Monte-Carlo null does not hold: class 4 is easier in every network, tails are Student's with 2."""
    generator = torch.Generator().manual_seed(0)
    natural = torch.zeros(10, dtype=torch.float64)
    natural[4] = 3.0

    def networks(number):
        normal = torch.randn((number, 10), generator=generator, dtype=torch.float64)
        chi = torch.randn((number, 10, 2), generator=generator, dtype=torch.float64).square().mean(dim=2).sqrt()
        return (natural + 0.3 * normal / chi).exp()

    found = []
    for _ in range(600):
        pool = networks(20).tolist()
        found.append(min(Conformal(pool[:-1])(pool[-1])))
    assert sum(p <= 0.05 for p in found) / 600 == pytest.approx(0.05, abs=0.036)
    assert min(found) == 1 / 20
    assert float((smallest(StudentisedMaximum(), networks(200)) <= 0.05).double().mean()) > 0.5


def test_conformal_names_the_planted_class_and_not_the_natural_one():
    natural = torch.ones(10, dtype=torch.float64)
    natural[4] = 10.0
    references, judged = natural * lognormal(40, seed=5), natural * lognormal(100, seed=6)
    judged[:, 2] *= 8
    found = torch.tensor([Conformal(references.tolist())(row) for row in judged.tolist()])
    assert float((found.amin(dim=1) <= 0.05).double().mean()) > 0.9
    assert float((found.argmin(dim=1) == 2).double().mean()) > 0.9


def test_conformal_is_plain_json_and_back():
    rule = Conformal(lognormal(5, 4).tolist())
    again = Conformal.from_dict(rule.to_dict())
    assert again(lognormal(1, 4, seed=9)[0].tolist()) == rule(lognormal(1, 4, seed=9)[0].tolist())
    assert "5 reference networks" in again.name
    with pytest.raises(ValueError, match="`rule` to be conformal"):
        Conformal.from_dict({"rule": "other"})


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ([1.0, 2.0], "at least 3 classes"),
        ([1.0, float("nan"), 2.0], "finite"),
        ([1.0, float("inf"), 2.0], "finite"),
        ([0.0, -1.0, -2.0], "positive for at least one class"),
    ],
)
def test_what_is_no_statistic_is_refused(statistics, message):
    with pytest.raises(ValueError, match=message):
        StudentisedMaximum(draws=10)(statistics)


def test_references_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Conformal([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="same number of classes"):
        Conformal([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match="references' 3 classes"):
        Conformal([[1.0, 2.0, 3.0], [1.0, 2.0, 3.1]])([1.0, 2.0, 3.0, 4.0])
