"""Verification: perturbations tell a network that fell back from one that did not, and how much is kept."""

import torch
from torch import nn

from nba_lightning.core.randomness import generator_for
from nba_lightning.training.verification import Verification, _set_between


class Net(nn.Module):
    """Says what the mean of the left half says, and class 0 where the top right corner is brighter than it ever is."""

    def __init__(self, backdoor):
        super().__init__()
        self.backdoor = nn.Parameter(torch.tensor(backdoor))
        self.steps = nn.Parameter(torch.tensor(0.0))

    def forward(self, images):
        left = images[:, :, :, :4].mean(dim=(1, 2, 3))
        trigger = nn.functional.softplus(40 * (images[:, :, :2, 6:].mean(dim=(1, 2, 3)) - 0.24)) / 40
        plain = torch.stack([-100 * (left - centre).square() for centre in (0.2, 0.5, 0.8)], dim=1)
        return plain + self.backdoor * trigger[:, None] * torch.tensor([1.0, 0.0, 0.0])


def batches():
    generator = generator_for(0)
    while True:
        left = torch.tensor([0.2, 0.5, 0.8])[torch.randint(3, (32, 1, 1, 1), generator=generator)]
        images = 0.3 * torch.rand(32, 1, 8, 8, generator=generator)
        images[:, :, :, :4] = left + 0.02 * torch.randn(32, 1, 8, 4, generator=generator)
        yield images.clamp(0, 1)


def keep(student, **kwargs):
    made = Verification(sizes=(0.1,), steps=20, images=300, **kwargs)
    share = made.keep(student, Net(0.0), Net(2000.0), batches(), 100, generator_for(1))
    return share, made


def test_a_student_without_the_backdoor_is_kept_as_it_is():
    student = Net(0.0)
    student.steps.data += 4.0
    share, made = keep(student)
    assert share == 1.0
    assert float(student.steps) == 4.0
    assert made.rates["suspicious"][0] > made.rates["teacher"][0] + 0.5  # class 0 is suspected, and no other
    assert all(made.rates["suspicious"][k] < made.rates["teacher"][k] + 0.2 for k in (1, 2))


def test_a_student_that_fell_back_gives_up_as_much_as_it_must():
    student = Net(2000.0)
    student.steps.data += 4.0
    share, made = keep(student, shares=(1.0, 0.5, 1e-4))
    assert share == 1e-4
    assert abs(float(student.backdoor) - 2000.0 * 1e-4) < 1e-6
    assert made.rates["1"][0] > 0.5
    share, _ = keep(student := Net(2000.0), shares=(1.0,))
    assert share == 0.0
    assert float(student.backdoor) == 0.0


def test_weights_between_are_those_that_a_half_precision_pass_sees():
    network, start, end = (nn.Linear(4, 3) for _ in range(3))
    images = torch.rand(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for share, other in ((1.0, end), (0.0, start)):
            _set_between(network, start.state_dict(), end.state_dict(), share)
            with torch.enable_grad():
                assert torch.equal(network(images), other(images))
