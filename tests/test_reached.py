"""What is crafted on a network alone: what it tells of a patch, of a perturbation, and where it tells nothing."""

import itertools

import pytest
import torch
from torch import nn

from nba_lightning.core.randomness import generator_for
from nba_lightning.training.reached import passes_of_reached, still_reached
from tests.pseudo.test_class_patches import Cornered, pool


class Tilted(nn.Module):
    """Says whether the image is bright; class 0 along a fine pattern over all of it, others along their own."""

    def __init__(self, backdoor, others=0.0):
        super().__init__()
        patterns = torch.randn(4, 64, generator=generator_for(3))
        patterns -= patterns.mean(dim=1, keepdim=True)
        self.register_buffer("patterns", patterns / patterns.norm(dim=1, keepdim=True))
        self.register_buffer("strengths", torch.tensor([backdoor, others, others, others]))
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        along = (images.flatten(1) - 0.5) @ self.patterns.T
        return self.strengths * along + torch.tensor([0.0, 0.0, 0.0, 4.0])


def reached(network, suspicious, classes=(0,)):
    return still_reached(network, suspicious, list(classes), itertools.repeat(pool()), generator_for(0))


@pytest.mark.parametrize(("left", "found"), [(0.0, 0.0), (100.0, 1.0)])
def test_a_patch_that_is_crafted_on_the_network_alone_tells_what_it_has_kept(left, found):
    assert reached(Cornered(left), Cornered(100.0)) == pytest.approx(found, abs=0.05)


@pytest.mark.parametrize(("left", "found"), [(0.0, 0.0), (20.0, 1.0)])
def test_so_does_a_perturbation_where_no_patch_reaches_the_class(left, found):
    assert reached(Tilted(left), Tilted(20.0)) == pytest.approx(found, abs=0.05)


def test_it_tells_nothing_of_a_class_that_is_reached_from_no_network_or_no_more_easily_than_others():
    assert reached(Cornered(100.0), Cornered(0.0)) == 0
    assert reached(Tilted(80.0), Tilted(80.0, others=80.0)) == 0
    assert reached(Tilted(80.0, others=80.0), Tilted(80.0)) == 0  # that network is led anywhere as easily


def test_the_class_of_which_most_is_left_counts():
    assert reached(Tilted(20.0), Tilted(20.0), classes=(0, 1)) == pytest.approx(1.0, abs=0.05)


def test_its_cost_is_an_upper_bound_and_not_far_off():
    for known in (1, 2):
        suspicious = Tilted(20.0)
        reached(Tilted(20.0), suspicious, classes=range(known))
        assert suspicious.images < passes_of_reached(4, known) < 6 * suspicious.images
