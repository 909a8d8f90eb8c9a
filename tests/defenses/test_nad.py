"""NAD against independent formulations."""

import pytest
import torch
from torch import nn

from nba_lightning import NAD
from nba_lightning.core.features import features
from nba_lightning.networks import SmallCNN
from tests.helpers import Spy, batch, cross_entropy, ready, small


def test_nad_s_loss_is_the_equation(network, trainer):
    teacher = SmallCNN(width=4, in_channels=1)
    module = ready(NAD(network, teacher=teacher, betas=[1.0, 2.0, 3.0]), trainer).eval()
    images, labels = torch.rand(5, 1, 8, 8), torch.randint(0, 10, (5,))
    loss = module.training_step((images, labels), 1)
    names = ["block1", "block2", "block3"]
    logits, observed = features(network, images, names)
    wanted = features(teacher.eval(), images, names)[1]
    expected = nn.functional.cross_entropy(logits, labels)
    for beta, name in zip((1.0, 2.0, 3.0), names, strict=True):
        total, count = 0.0, 0
        for mine, theirs in zip(observed[name], wanted[name], strict=True):  # one image and one position at a time
            maps = [(f**2).sum(dim=0).flatten() for f in (mine, theirs)]
            maps = [m / (m**2).sum().sqrt() for m in maps]
            total, count = total + ((maps[0] - maps[1]) ** 2).sum(), count + len(maps[0])
        expected = expected + beta * total / count
    torch.testing.assert_close(loss, expected)


def test_nad_s_defaults_and_bad_arguments(network):
    assert NAD(network).betas == [500.0, 1000.0, 1000.0]
    with pytest.raises(ValueError, match=r"Expected `betas` to be 3 weights, one for each layer, but got \[1.0\]"):
        NAD(network, betas=[1.0])
    with pytest.raises(ValueError, match="Expected `betas` to be at least 0, but got -1"):
        NAD(network, betas=[1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="got blok. Available"):
        NAD(network, layers=["blok"])


def test_nad_asks_the_teacher_in_eval_mode_about_the_same_images_and_trains_the_student_alone(network, trainer):
    module = ready(NAD(Spy(network), teacher=Spy(small())), trainer).train()
    images, labels = batch()
    module.training_step((images, labels), 1).backward()
    student, teacher = module.model, module.teacher.network
    assert teacher.modes == [{False}]
    assert student.modes == [{True}]
    torch.testing.assert_close(teacher.images[0], images)
    torch.testing.assert_close(student.images[0], images)
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_nad_s_power_is_the_exponent_of_the_attention_maps(network, trainer):
    images, labels = batch()
    teacher = small()
    module = ready(NAD(network, teacher=teacher, layers=["block2"], betas=[7.0], power=3.0), trainer).eval()
    maps = []
    for one in (network, teacher.eval()):
        magnitudes = features(one, images, ["block2"])[1]["block2"].abs() ** 3
        sums = magnitudes.sum(dim=1).flatten(1)
        maps.append(sums / (sums * sums).sum(dim=1, keepdim=True) ** 0.5)
    expected = cross_entropy(network(images), labels) + 7.0 * ((maps[0] - maps[1]) ** 2).mean()
    torch.testing.assert_close(module.training_step((images, labels), 1), expected)
