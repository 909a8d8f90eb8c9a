"""Pictures for the report: of a layer whose attention shows a place."""

import json

import pytest
import torch
from torch import nn

from nba_lightning import NBA, CleanImages, Normalized
from nba_lightning.app.pictures import save_pictures
from tests.app.conftest import write_images


class Pyramid(nn.Module):
    """Maps of 8x8, 4x4 and 2x2 for images of 8x8."""

    def __init__(self, layers):
        super().__init__()
        self.feature_layers = layers
        self.eight, self.four = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 2, 2)
        self.two, self.fc = nn.Conv2d(4, 4, 2, 2), nn.Linear(4, 3)

    def forward(self, images):
        return self.fc(self.two(self.four(self.eight(images))).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("layers", "shown"), [(["eight", "four", "two"], "four"), (["eight", "two"], "eight"), (["two"], "two")]
)
def test_attention_is_of_the_last_layer_with_cells_enough_to_show_a_place(layers, shown, tmp_path):
    torch.manual_seed(0)
    data = CleanImages(str(write_images(tmp_path / "images", 4)), held_out=0.2)
    data.setup()
    student, teacher, suspicious = (Normalized(Pyramid(layers), [0.5], [0.25]) for _ in range(3))
    assert save_pictures(tmp_path / "report", NBA(student, teacher=teacher), suspicious, data) == []
    assert json.loads((tmp_path / "report" / "attention.json").read_text())["layer"] == shown
