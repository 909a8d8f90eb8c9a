"""What NBA crafts its pseudo samples with."""

import copy

import torch

from nba_lightning import NBA
from nba_lightning.pseudo import PseudoSamples, UniversalPerturbations
from tests.helpers import Spy, batch, lively, ready, small


class Note(PseudoSamples):
    """Crafts nothing and notes what it is called with."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift, self.crafted, self.asked = shift, [], []

    def regenerate(self, student, teacher, batches, generator=None, reduce=None):
        images = [next(iter(batches)).clone() for _ in range(3)]
        self.crafted.append((student, teacher, images, torch.rand(4, generator=generator), reduce))

    def forward(self, images, student=None, teacher=None, generator=None):
        self.asked.append((images.clone(), student, teacher, torch.rand(4, generator=generator)))
        return torch.full_like(images, self.shift)


def test_crafting_gets_student_and_teacher_other_batches_and_a_draw_for_each_epoch(network, trainer, clean_digits):
    note = Note()
    module = NBA(network, teacher=small(), pseudo=note)
    trainer(max_epochs=2).fit(module, clean_digits)
    assert len(note.crafted) == 2  # once an epoch
    for student, teacher, images, _, reduce in note.crafted:
        assert student is module.model
        assert teacher is module.teacher.network
        assert reduce == module.reduce
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[1], images[2])
        assert all(0.0 <= float(one.min()) <= float(one.max()) <= 1.0 for one in images)
    assert not torch.equal(note.crafted[0][3], note.crafted[1][3])
    assert all(student is module.model and teacher is module.teacher.network for _, student, teacher, _ in note.asked)
    draws = [draw for *_, draw in note.asked]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)  # no step has another's draw


def test_pseudo_samples_are_the_first_share_of_a_batch_and_within_the_range_of_images(network, trainer):
    module = ready(NBA(network, teacher=small(), pseudo=Note(0.4), pseudo_share=0.5), trainer)
    images, _ = batch(8)
    found = module._perturbed(images, torch.Generator())
    torch.testing.assert_close(found, torch.cat([(images[:4] + 0.4).clip(max=1.0), images[4:]]))
    module.pseudo.shift = -0.4
    assert float(module._perturbed(images, torch.Generator()).min()) == 0.0
    assert all(torch.equal(given, images[:4]) for given, *_ in module.pseudo.asked)


def test_crafting_runs_in_eval_mode_within_a_fit_and_changes_no_statistics(network, trainer, clean_digits):
    module = NBA(Spy(lively(network)), teacher=Spy(small()), pseudo=UniversalPerturbations(2, rms=0.9, steps=4))
    student, teacher, seen = module.model, module.teacher.network, []
    regenerate = module.pseudo.regenerate

    def look(*args):
        before, modes = copy.deepcopy(network.state_dict()), [layer.training for layer in network.modules()]
        first = len(student.modes), len(teacher.modes)
        regenerate(*args)
        seen.append((student.modes[first[0] :], teacher.modes[first[1] :]))
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert [layer.training for layer in network.modules()] == modes == [True] * len(modes)
        for mine, theirs in zip(student.images[first[0] :], teacher.images[first[1] :], strict=True):
            assert torch.equal(mine, theirs)
            assert 0.0 <= float(mine.min()) <= float(mine.max()) <= 1.0

    module.pseudo.regenerate = look
    trainer().fit(module, clean_digits)
    assert seen == [([{False}] * 4, [{False}] * 4)]
