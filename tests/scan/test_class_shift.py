"""Shortest shifts: closed values, scipy's quadratic programs, classes that no shift reaches."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import nn

from nba_lightning.scan import ClassShift
from nba_lightning.scan.class_shift import needed_change, shortest_shifts


def one_hot_network(classes=5, planted=None, strength=0.0):
    """Logit k is pixel k; one more pixel, never lit, adds ``strength`` to the planted class."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(classes + 1, classes))
    weight = torch.eye(classes, classes + 1)
    if planted is not None:
        weight[planted, classes] = strength
    network[1].weight.data, network[1].bias.data = weight, torch.zeros(classes)
    return network


def one_hot_images(classes=5):
    return torch.eye(classes, classes + 1).view(classes, 1, 1, classes + 1)


@pytest.mark.parametrize("strength", [0.0, 1.0, 5.0])
def test_a_planted_shift_has_its_closed_value(strength):
    """By symmetry d = (p at the class, -q at the others, e): the length is 1 / sqrt(K / (K - 1) + strength ** 2)."""
    result = ClassShift(share=1.0)(one_hot_network(planted=2, strength=strength), [one_hot_images()])
    assert result.statistics[2] == pytest.approx((5 / 4 + strength**2) ** 0.5)
    assert result.statistics[0] == pytest.approx(result.statistics[4])
    if strength:
        assert result.suspect == 2
        assert result.p_values[2] < 0.01
        assert min(result.statistics[k] for k in (0, 1, 3, 4)) == pytest.approx((5 / 4) ** 0.5, rel=0.2)


def reference(weight, needed, k):
    """The shortest shift `(D,)`, by least distance programming over scipy's active-set solver."""
    others = [j for j in range(len(weight)) if j != k]
    rows, right = weight[k] - weight[others], needed[k, others]
    stacked, aim = np.vstack([rows.T, right]), np.append(np.zeros(rows.shape[1]), 1.0)
    left = stacked @ nnls(stacked, aim)[0] - aim
    shift = -left[:-1] / left[-1]
    assert (rows @ shift >= right - 1e-9).all()
    return shift


@pytest.mark.parametrize(("classes", "dimensions", "scale"), [(4, 20, 1.0), (10, 64, 100.0), (12, 12, 1e-3)])
def test_lengths_are_those_of_scipy(classes, dimensions, scale):
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn((classes, dimensions), generator=generator, dtype=torch.float64)
    needed = torch.rand((classes, classes), generator=generator, dtype=torch.float64) * 5 - 1
    lengths, residuals = shortest_shifts(weight * scale, needed * scale)
    assert residuals.max() < 1e-6
    for k in range(classes):
        shortest = np.linalg.norm(reference(weight.numpy(), needed.numpy(), k))
        assert float(lengths[k]) == pytest.approx(shortest, rel=1e-4)


def test_more_classes_than_dimensions_and_classes_that_no_shift_reaches():
    weight = torch.tensor([[-2.0], [-1.0], [0.5], [3.0]], dtype=torch.float64)
    needed = torch.ones(4, 4, dtype=torch.float64)
    lengths, _ = shortest_shifts(weight, needed)
    # On a line only the outer classes can win over both neighbours: by 1 / their distance to the next.
    assert lengths.tolist() == pytest.approx([1.0, torch.inf, torch.inf, 1 / 2.5])
    angles = torch.linspace(0, 2 * torch.pi, 31, dtype=torch.float64)[:30]
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    found, residuals = shortest_shifts(circle, torch.ones(30, 30, dtype=torch.float64))
    # The next one on the circle binds: (w_k - w_j) d = r (1 - cos(2 pi / 30)) along w_k.
    assert found.tolist() == pytest.approx([1 / (1 - float(angles[1].cos()))] * 30, rel=1e-3)
    assert residuals.max() < 1e-3


def test_a_class_that_no_shift_reaches_is_no_outlier():
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 4))
    network[1].weight.data = torch.tensor([[-2.0], [-1.0], [0.5], [3.0]])
    network[1].bias.data = torch.tensor([0.5, 0.0, 0.0, 0.0])
    result = ClassShift()(network, [torch.linspace(0, 1, 8).view(8, 1, 1, 1)])
    assert result.statistics[1] == result.statistics[2] == 0.0
    assert min(result.p_values[1:3]) > 0.05


def test_a_share_leaves_out_the_hardest_images():
    easy = torch.eye(3, dtype=torch.float64).repeat(10, 1)
    hard = torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64)
    logits, weight = torch.cat([easy, hard]), torch.eye(3, dtype=torch.float64)
    assert needed_change(logits, weight, 2, 1.0).tolist() == [50.0, 1.0, 0.0]
    assert needed_change(logits, weight, 2, 0.9).tolist() == [1.0, 1.0, 0.0]
    assert needed_change(logits, weight, 0, 1.0).tolist() == [0.0, 1.0, 1.0]  # its own images do not count


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_shift_turns_the_share_of_images(share):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    images = torch.rand(200, 1, 4, 4)
    head = network[3]
    with torch.no_grad():
        hidden = network[2](network[1](images.flatten(1))).double()
        logits, weight = network(images).double(), head.weight.double()
    for k in range(4):
        needed = torch.stack([needed_change(logits, weight, j, share) for j in range(4)])
        lengths, _ = shortest_shifts(weight, needed)
        shift = reference(weight.numpy(), needed.numpy(), k)
        assert float(lengths[k]) == pytest.approx(np.linalg.norm(shift), rel=1e-3)
        turned = (hidden + torch.from_numpy(shift) * 1.0001) @ weight.T + head.bias.double()
        others = logits.argmax(dim=1) != k
        assert float((turned[others].argmax(dim=1) == k).double().mean()) >= share - 0.01


def test_the_head_is_found_or_named_or_missed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 3)
            self.unused = nn.Linear(4, 3)
            self.scale = 1.0

        def forward(self, images):
            return self.last(images.flatten(1)) * self.scale

    torch.manual_seed(0)
    network, images = Odd(), torch.rand(30, 1, 2, 2)
    assert ClassShift()(network, [images]).statistics == ClassShift(head="last")(network, [images]).statistics
    with pytest.raises(ValueError, match="`head` to be the path of a linear layer, but got 'first'"):
        ClassShift(head="first")(network, [images])
    with pytest.raises(ValueError, match="`head` to be the linear layer whose output is the network's, but got 'unus"):
        ClassShift(head="unused")(network, [images])
    network.scale = 2.0
    with pytest.raises(ValueError, match="`network` to be one that ends in a linear layer, but got Odd"):
        ClassShift()(network, [images])


def test_a_network_that_gives_all_images_to_one_class_is_refused():
    network = one_hot_network()
    network[1].bias.data[3] = 9.0
    with pytest.raises(ValueError, match="at least two classes, but got class 3 for all 5 images"):
        ClassShift()(network, [one_hot_images()])


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="`share` to be in"):
        ClassShift(share=share)
