"""Which rates a teacher is tried at, and which of them is taken."""

from types import SimpleNamespace

import pytest

from nba_lightning.app import teachers
from nba_lightning.app.teachers import fit_teacher
from nba_lightning.networks import SmallCNN

RIGHT = {0.2: 0.7, 0.1: 0.8, 0.05: 0.86, 0.025: 0.88}
"""Accuracy on held-out images; the suspicious network's is 0.88."""


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Rates in the order in which they were tried, of fits that come to these accuracies."""
    rates = []

    def fit(network, link, rate, seed, show):
        rates.append(rate)
        figures = {
            name: {"value": value, "images": 200} for name, value in (("suspicious", 0.88), ("student", RIGHT[rate]))
        }
        return {"file": f"{rate:g}", "accuracies": figures, "verdict": "accepted", "chosen": {"rate": rate}}

    monkeypatch.setattr(teachers, "_try", fit)
    return rates


def chosen(tmp_path, monkeypatch, images, withstanding):
    """The rate that is taken with so many images, where these rates withstand what the strongest does."""
    monkeypatch.setattr(
        teachers, "_withstanding", lambda network, files, *_: [one for one in files if one in withstanding]
    )
    data = SimpleNamespace(training=range(images))
    link = lambda name: SimpleNamespace(name=name, folder=tmp_path / name, data=data)  # noqa: E731
    chain = SimpleNamespace(folder=tmp_path, step=lambda name, work: work())
    found, others = fit_teacher(SmallCNN(), link, chain, 0.1, held_out=True, seed=0, show=False)
    assert found["chosen"]["rate"] not in others
    return found["chosen"]["rate"]


def test_the_rate_that_the_search_left_out_is_tried_and_taken_if_it_withstands(tmp_path, monkeypatch, tried):
    assert chosen(tmp_path, monkeypatch, 500, {0.1, 0.05}) == 0.05
    assert tried == [0.025, 0.1, 0.2, 0.05]


def test_it_is_not_taken_if_it_does_not(tmp_path, monkeypatch, tried):
    assert chosen(tmp_path, monkeypatch, 500, {0.1}) == 0.1
    assert chosen(tmp_path, monkeypatch, 500, {0.1, 0.05, 0.025}) == 0.025  # the most accurate


def test_it_is_not_tried_where_too_few_images_tell_teachers_apart(tmp_path, monkeypatch, tried):
    assert chosen(tmp_path, monkeypatch, 150, {0.1}) == 0.1
    assert tried == [0.025, 0.1, 0.2]
