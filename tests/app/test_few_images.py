"""So few images that none is held out: what can be said is said, and a wrecked network is not handed over."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nba_lightning.app import fits
from nba_lightning.app.cli import main
from nba_lightning.core.paired import Paired
from tests.app.conftest import write_images
from tests.app.test_clean import COMMAND, Ruined, report


@pytest.fixture
def few(owner):
    shutil.rmtree("images")
    write_images(owner / "images", 4)
    return owner


def test_twelve_images_are_cleaned_and_said_to_prove_nothing(few):
    with pytest.warns(UserWarning, match="0 held out"):
        main(COMMAND)
    found = report()
    assert found["accuracy"]["cleaned"]["held_out"] is False
    assert found["accuracy"]["cleaned"]["images"] == 12
    assert any("cannot know what the student lost" in warning for warning in found["warnings"])
    assert "on images that it was fitted on, which flatters it" in Path("cleaned/report.html").read_text()


def test_a_network_that_is_wrecked_on_its_own_training_images_is_rejected(few, monkeypatch):
    monkeypatch.setattr(fits, "NBA", lambda network, **kwargs: Ruined(network, **(kwargs | {"lr": 0.5})))
    for _ in range(2):  # also when the same command is given again
        with pytest.raises(SystemExit) as end, pytest.warns(UserWarning, match="0 held out"):
            main([*COMMAND, "--student_steps=100"])
        assert end.value.code == 3
        assert sorted(path.name for path in Path("cleaned").glob("*d.safetensors")) == ["rejected.safetensors"]
        found = report()
        assert found["weights"]["file"] == "rejected.safetensors"
        assert "of the 12 images that it was fitted on, the suspicious network on 12" in found["weights"]["reason"]
        assert not any("cannot know" in warning for warning in found["warnings"])
    assert load_file("cleaned/rejected.safetensors").keys() == load_file("suspicious.safetensors").keys()


@pytest.mark.parametrize("images", [12, 39, 40, 1000])
def test_what_few_changed_images_show_is_beyond_chance_by_the_exact_test_too(images):
    """Half to the fifth is 0.03, to the sixth 0.016; twice the standard error alone would take five for proof."""
    five, six = Paired(images, 5, 0), Paired(images, 6, 0)
    assert five.loss > 2 * five.standard_error
    assert not five.beyond_chance()
    assert six.beyond_chance()
