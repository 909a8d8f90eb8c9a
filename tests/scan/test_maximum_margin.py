"""The largest margin has a closed value for a linear network, and points at the target of a real backdoor."""

import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from nba_lightning.scan import MaximumMargin
from tests.scan.zoo import PixelGroups


def test_the_largest_margin_of_a_linear_network_is_its_closed_value():
    result = MaximumMargin(starts=4)(PixelGroups([1.0, 2.0, 3.0, 9.0]), image_shape=(1, 4, 4))
    assert result.statistics == pytest.approx([1.0, 2.0, 3.0, 9.0], rel=0.01)
    assert result.suspect == 3
    assert result.pictures[3, 0, 3].tolist() == [1.0] * 4


def test_it_is_the_linear_program_s_value():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    weight, bias = network[1].weight.detach().double().numpy(), network[1].bias.detach().double().numpy()
    found = MaximumMargin(starts=8, steps=300)(network, image_shape=(1, 4, 4)).statistics
    for k in range(4):
        others = [j for j in range(4) if j != k]
        # Maximise t with (w_k - w_j) x + b_k - b_j >= t for all other classes j.
        rows = [[*(weight[j] - weight[k]), 1.0] for j in others]
        right = [bias[k] - bias[j] for j in others]
        best = linprog([0.0] * 16 + [-1.0], rows, right, bounds=[(0, 1)] * 16 + [(None, None)])
        assert found[k] <= -best.fun + 1e-4
        assert found[k] == pytest.approx(-best.fun, rel=0.02)


def test_the_scale_of_the_logits_changes_nothing():
    """The authors' steps of plain SGD move a network with small logits hardly at all."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
    first = MaximumMargin(starts=3)(network, image_shape=(1, 4, 4))
    network[3].weight.data /= 1000
    network[3].bias.data /= 1000
    second = MaximumMargin(starts=3)(network, image_shape=(1, 4, 4))
    assert second.p_values == pytest.approx(first.p_values, abs=0.01)
    assert [1000 * s for s in second.statistics] == pytest.approx(first.statistics, rel=0.01)


def test_batches_change_nothing_and_passes_are_counted():
    network = PixelGroups([1.0, 2.0, 3.0])
    whole, parts = (
        MaximumMargin(starts=5, steps=7, batch_size=size)(network, image_shape=(1, 3, 4)) for size in (99, 4)
    )
    assert whole.statistics == pytest.approx(parts.statistics)
    assert whole.passes == parts.passes == 15 * (7 + 8)


def test_the_loader_only_says_how_large_images_are():
    network = PixelGroups([1.0, 2.0, 3.0])
    scan = MaximumMargin(starts=2)
    by_loader = scan(network, [torch.zeros(2, 1, 3, 4)])
    assert by_loader.statistics == scan(network, image_shape=(1, 3, 4)).statistics
    with pytest.raises(ValueError, match="`loader` to be given for MaximumMargin"):
        scan(network)


@pytest.mark.parametrize("changed", [{"starts": 0}, {"steps": 0}, {"rms": 0.0}, {"batch_size": 0}, {"max_images": 0}])
def test_arguments_out_of_range_are_refused(changed):
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}`"):
        MaximumMargin(**changed)
