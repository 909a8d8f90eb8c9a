"""Perturbations that only the network falls for: known answers for linear networks, and how they are counted."""

import copy

import pytest
import torch
from torch import nn

from nba_lightning.scan import TeacherDisagreement

CLASSES = 5


def linear(planted=None, strength=0.0):
    """Logit k is pixel k; the dark sixth pixel adds ``strength`` times its value to the planted class."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(CLASSES + 1, CLASSES))
    weight = torch.eye(CLASSES, CLASSES + 1)
    if planted is not None:
        weight[planted, CLASSES] = strength
    network[1].weight.data, network[1].bias.data = weight, torch.zeros(CLASSES)
    return network


def batches():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    images = torch.zeros(60, 1, 1, CLASSES + 1)
    images[torch.arange(60), 0, 0, labels] = 0.4 + 0.6 * torch.rand(60, generator=generator)
    return [(images, labels)]


def test_the_planted_class_and_pixel_are_found():
    scan = TeacherDisagreement(linear(), rms=(0.1,), step_images=30)
    result = scan(linear(planted=3, strength=20.0), batches())
    assert result.suspect == 3
    assert result.p_values[3] < 0.01
    # A size of 0.1 is a length of 0.245: the sixth pixel at that gains 4.9, and no image has more than 1.
    assert result.details["shares"]["0.1"][3] == 1.0
    assert result.pictures[3].flatten().argmax() == CLASSES
    assert result.examples.shape == (CLASSES, 4, 1, 1, CLASSES + 1)
    assert bool((linear(3, 20.0)(result.examples[3]).argmax(dim=1) == 3).all())
    # Half an image on both sides: 48 of 48 are odds of 48.5 / 0.5, none are 0.5 / 48.5.
    assert result.statistics[3] == pytest.approx(97.0)


def test_what_the_teacher_falls_for_too_does_not_count():
    network = linear(planted=3, strength=20.0)
    result = TeacherDisagreement(copy.deepcopy(network), rms=(0.1,), step_images=30)(network, batches())
    assert result.details["shares"]["0.1"] == [0.0] * CLASSES
    assert min(result.p_values) == 1.0


def test_sizes_are_kept_and_averaged_as_logarithms_of_odds():
    network, teacher = linear(planted=3, strength=3.0), linear()
    small, large = (TeacherDisagreement(teacher, rms=(r,), step_images=30)(network, batches()) for r in (0.05, 0.2))
    both = TeacherDisagreement(teacher, rms=(0.05, 0.2), step_images=30)(network, batches())
    assert small.details["shares"]["0.05"][3] < large.details["shares"]["0.2"][3]
    for k in range(CLASSES):
        assert both.statistics[k] == pytest.approx((small.statistics[k] * large.statistics[k]) ** 0.5)
    rms = large.pictures.flatten(1).square().mean(dim=1).sqrt()
    assert rms.max() <= 0.2 + 1e-6
    assert rms[3] == pytest.approx(0.2, rel=1e-4)


def test_chunks_of_classes_change_nothing_but_rounding():
    network, teacher = linear(planted=1, strength=2.0), linear()
    whole, parts = (
        TeacherDisagreement(teacher, rms=(0.1,), step_images=30, batch_size=size)(network, batches())
        for size in (999, 7)
    )
    assert torch.allclose(whole.pictures, parts.pictures, atol=1e-6)
    assert whole.details == parts.details
    assert whole.passes == parts.passes


def test_without_labels_the_teacher_s_answers_are_the_labels():
    network, teacher = linear(planted=3, strength=20.0), linear()
    with_labels = TeacherDisagreement(teacher, rms=(0.1,))(network, batches())
    without = TeacherDisagreement(teacher, rms=(0.1,))(network, [images for images, _ in batches()])
    assert without.statistics == with_labels.statistics


def test_teachers_and_images_that_do_not_fit_are_refused():
    other = nn.Sequential(nn.Flatten(), nn.Linear(CLASSES + 1, 4))
    with pytest.raises(ValueError, match="`teacher` to be a network of the same 5 classes"):
        TeacherDisagreement(other)(linear(), batches())
    broken = linear()
    broken[1].bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"`teacher` to have finite weights, but got NaN or infinity in 1\.bias"):
        TeacherDisagreement(broken)(linear(), batches())
    with pytest.raises(ValueError, match="`teacher` to be on the network's device"):
        TeacherDisagreement(linear().to("meta"))(linear(), batches())
    with pytest.raises(ValueError, match="images of at least two classes, but got class 2 only"):
        TeacherDisagreement(linear())(linear(), [(torch.rand(4, 1, 1, 6), torch.full((4,), 2))])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rms": ()}, r"`len\(rms\)`"),
        ({"rms": (0.1, 0.0)}, "`rms`"),
        ({"steps": 0}, "`steps`"),
        ({"step_images": 0}, "`step_images`"),
        ({"examples": 0}, "`examples`"),
    ],
)
def test_arguments_out_of_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        TeacherDisagreement(linear(), **changed)
