"""The loop that NBA is measured against makes the passes that NBA makes."""

import argparse
import importlib

import pytest
import torch

from nba_lightning.networks import SmallCNN
from tests import benchmark_calls  # noqa: F401  (puts the benchmarks on the path)


@pytest.fixture
def speed(monkeypatch):
    return importlib.import_module("speed")


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(images=100, side=32, rounds=2, precision="32-true", work=tmp_path)


def test_the_bare_loop_makes_the_passes_of_todays_nba(speed, args, monkeypatch):
    passes = []

    def counted(_):
        network = SmallCNN(width=4)
        network.register_forward_hook(lambda _, inputs, logits: passes.append((len(inputs[0]), logits.requires_grad)))
        return network

    def both(_, first, second):
        found = []
        for function in (first, second):
            passes.clear()
            function()
            found.append((sum(n for n, _ in passes), sum(n for n, gradient in passes if gradient)))
        return found

    monkeypatch.setattr(speed, "network", counted)
    monkeypatch.setattr(speed, "ratio", both)
    (whole, trained), (bare, trained_bare) = speed.nba_over_its_passes(args)
    assert trained_bare == trained == 100
    assert bare == 100 * 3 + 8 * 8 * 8 * 2
    assert whole == bare + 50  # and a look at the first batch


def test_growth_is_measured_with_its_own_images_and_size(speed, args):
    seen = []

    def measured(changed):
        seen.append((changed.images, changed.side, changed.rounds))
        return {"mean": 1.0, "std": 0.0, "n": 2}

    assert speed.at(measured, images=7, side=64)(args) == {"mean": 1.0, "std": 0.0, "n": 2, "images": 7, "side": 64}
    assert seen == [(7, 64, 2)]
    assert args.side == 32
    names = {name for name in speed.RATIOS if name.endswith(("_images", "_px"))}
    assert {"nba_over_fine_tuning_of_100_images", "memory_of_nba_over_fine_tuning_at_224_px"} <= names
    images, _ = next(iter(speed.batches(argparse.Namespace(images=4, side=48), 4)))
    assert images.shape == (4, 3, 48, 48)
    assert torch.is_floating_point(images)


@pytest.mark.parametrize(("gpus", "asked"), [(0, True), (1, False), (2, True)])
def test_two_processes_are_not_asked_of_one_gpu(speed, gpus, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert speed.possible() == [name for name in speed.RATIOS if asked or name != "two_processes_over_one"]
