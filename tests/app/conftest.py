"""An owner: a folder of coloured images, a network in a file of their own, its weights."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

MINE = '''
import torch
from torch import nn


class Colours(nn.Module):
    """Knows red, green and blue squares, given normalised images."""

    feature_layers = ["first"]

    def __init__(self, num_classes=3):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, images):
        return self.fc(torch.relu(self.first(images)).mean(dim=(2, 3)))


def good(num_classes=3):
    """With weights that know the colours."""
    network = Colours(num_classes)
    with torch.no_grad():
        network.first.weight.copy_(torch.eye(3).repeat(2, 1).view(6, 3, 1, 1))
        network.first.bias.fill_(1.0)
        network.fc.weight.zero_()
        network.fc.weight[:3, :3] = 10 * torch.eye(3)
        network.fc.bias.zero_()
    return network


def number(num_classes=3):
    return num_classes
'''
COLOURS = ("blue", "green", "red")  # the alphabetical order
CHANNELS = {"blue": 2, "green": 1, "red": 0}


def write_images(root, number, size=8):
    """``number`` noisy images of each colour."""
    generator = torch.Generator().manual_seed(0)
    for name, channel in CHANNELS.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels = torch.rand(3, size, size, generator=generator) * 120
            pixels[channel] += 100
            Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def owner(tmp_path, monkeypatch) -> Path:
    """A working folder with ``images``, ``mine.py`` and ``suspicious.safetensors``, whose order is blue, green, red."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(MINE)
    namespace = {}
    exec(MINE, namespace)
    network = namespace["good"]()
    with torch.no_grad():
        network.fc.weight.copy_(network.fc.weight[[2, 1, 0]])
    save_file(network.state_dict(), tmp_path / "suspicious.safetensors")
    write_images(tmp_path / "images", 30)
    yield tmp_path
    import sys

    sys.modules.pop("mine", None)
