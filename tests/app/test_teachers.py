"""Which rates a teacher is tried at, and which of them is taken."""

from types import SimpleNamespace

import pytest
import torch

from nba_lightning.app import teachers
from nba_lightning.app.teachers import fit_teacher
from nba_lightning.io.weights import save_weights
from nba_lightning.networks import SmallCNN

RIGHT = {0.2: 0.7, 0.14: 0.79, 0.1: 0.8, 0.05: 0.86, 0.025: 0.88}
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


def chosen(tmp_path, monkeypatch, images, withstanding, kept=(), told=None):
    """The rate that is taken with so many images, where these rates withstand what the strongest does.

    ``kept`` is what the strongest has kept, asked once and again; ``told`` takes what is asked, and what came of it.
    """
    kept, told = [*kept, 0.0], {} if told is None else told

    def compared(network, files, witness, *_):
        told.setdefault("asked", []).append((list(files), witness))
        return {"equal": [one for one in files if one in withstanding], "left": kept.pop(0)}

    monkeypatch.setattr(teachers, "_withstanding", compared)
    data = SimpleNamespace(training=range(images))
    link = lambda name: SimpleNamespace(name=name, folder=tmp_path / name, data=data)  # noqa: E731
    chain = SimpleNamespace(folder=tmp_path, step=lambda name, work: work())
    found, others = fit_teacher(SmallCNN(), link, chain, 0.1, held_out=True, seed=0, show=False)
    assert found["chosen"]["rate"] not in others
    told |= {"left": found["left"], "others": others}
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


@pytest.mark.parametrize(("right", "taken"), [(0.79, 0.14), (0.77, 0.1)])
def test_where_a_stronger_one_bears_witness_to_a_backdoor_a_rate_between_is_tried(
    tmp_path, monkeypatch, tried, right, taken
):
    monkeypatch.setitem(RIGHT, 0.14, right)
    told = {}
    assert chosen(tmp_path, monkeypatch, 500, {taken}, kept=(0.11, 0.02), told=told) == taken
    assert tried == [0.025, 0.1, 0.2, 0.05, 0.14]
    assert told["asked"][0] == ([0.1, 0.05, 0.025], "0.2")
    if taken == 0.14:
        assert told["asked"][1:] == [([0.14, 0.1, 0.05, 0.025], "0.2")]
        assert told["left"] == 0.02
    else:
        assert told["left"] == 0.11  # it is said
        assert "it lost too much accuracy (77.0 %" in told["others"][0.14]


def test_no_rate_between_is_tried_where_nothing_was_kept_or_nobody_bears_witness(tmp_path, monkeypatch, tried):
    told = {}
    assert chosen(tmp_path, monkeypatch, 500, {0.1}, kept=(0.09,), told=told) == 0.1
    assert tried == [0.025, 0.1, 0.2, 0.05]
    monkeypatch.setitem(RIGHT, 0.2, 0.43)  # of 0.88; a ruin
    told.clear()
    assert chosen(tmp_path, monkeypatch, 500, {0.1}, kept=(0.0,), told=told) == 0.1
    assert told["asked"] == [([0.1, 0.05, 0.025], None)]


def test_the_networks_that_are_compared_have_the_weights_of_their_rates(tmp_path, monkeypatch):
    asked = {}

    def withstanding(self, networks, suspicious, batches, one_pass, generator, witness=None):
        own = [float(one.fc.bias[0].detach()) for one in [*networks, suspicious]]
        asked["weights"] = [*own, *([] if witness is None else [float(witness.fc.bias[0].detach())])]
        asked["batches"] = [next(batches).shape for _ in range(one_pass)]
        return [0, 1], 0.3

    def network(number):
        made = SmallCNN(width=4, in_channels=1)
        torch.nn.init.constant_(made.fc.bias, number)
        return made

    monkeypatch.setattr(teachers.Verification, "withstanding", withstanding)
    (tmp_path / "fits").mkdir()
    for number, name in enumerate(("first", "second", "third")):
        save_weights(network(number).state_dict(), tmp_path / "fits" / name)
    data = SimpleNamespace(
        training=torch.arange(210),
        num_classes=10,
        images_at=lambda places: SimpleNamespace(images=torch.zeros(len(places), 1, 8, 8, dtype=torch.uint8)),
    )
    link = SimpleNamespace(data=data, batch=50, places=SimpleNamespace(device=lambda: torch.device("cpu")))
    chain = SimpleNamespace(folder=tmp_path)
    files = {0.1: "second", 0.05: "third"}
    found = teachers._withstanding(network(7), files, "first", link, chain, 0, False)
    assert found == {"equal": [0.1, 0.05], "left": 0.3}
    assert asked["weights"] == [1.0, 2.0, 7.0, 0.0]
    assert [shape[0] for shape in asked["batches"]] == [50, 50, 50, 50, 10]
    assert teachers._withstanding(network(7), files, None, link, chain, 0, False)["equal"] == [0.1, 0.05]
    assert asked["weights"] == [1.0, 2.0, 7.0]
    asked.clear()
    assert teachers._withstanding(network(7), {0.1: "second"}, None, link, chain, 0, False) == {
        "equal": [0.1],
        "left": 0.0,
    }
    assert not asked
