"""Verification: perturbations tell a network that fell back from one that did not, and how much is kept."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from nba_lightning.core.randomness import generator_for
from nba_lightning.pseudo import ClassPatches, ClassPerturbations
from nba_lightning.pseudo.base import same
from nba_lightning.training import evidence as asking
from nba_lightning.training import search as searching
from nba_lightning.training import verification
from nba_lightning.training.choice import Found, choose
from nba_lightning.training.evidence import Evidence
from nba_lightning.training.search import Search
from nba_lightning.training.verification import Verification
from nba_lightning.training.ways import OVER, place_on, set_at


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


SEARCH = Search(sizes=(0.1,), steps=20, images=300)


def keep(student, **kwargs):
    made = Verification(search=SEARCH, **kwargs)
    share = made.keep(student, Net(0.0), Net(2000.0), batches(), 100, generator_for(1))
    return share, made


def test_a_student_without_the_backdoor_is_kept_as_it_is():
    student = Net(0.0)
    student.steps.data += 4.0
    share, made = keep(student)
    assert share == 1.0
    assert float(student.steps.detach()) == 4.0
    assert made.rates["suspicious"][0] > made.rates["teacher"][0] + 0.5  # class 0 is suspected, and no other
    assert all(made.rates["suspicious"][k] < made.rates["teacher"][k] + 0.2 for k in (1, 2))


def test_it_says_what_it_is_about_since_it_may_take_longer_than_the_fit(caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        keep(Net(0.0), shares=(1.0, 0.5), direct=(0.3,))
    told = [record.getMessage() for record in caplog.records]
    sizes = sum("Searching: perturbations of 3 classes, size " in line for line in told)
    assert 1 <= sizes <= len(SEARCH.sizes)
    assert any(f"Searching: patches of 3 classes, {SEARCH.grid**2} places" in line for line in told)
    assert [line.partition(":")[0] for line in told[:-1]] == ["Verifying"] + ["Searching"] * (sizes + 1) + [
        "Verifying"
    ] * 3
    for way, places in {"halfway": 5, "direct": 1, "over the student": 2}.items():
        assert any(f"'{way}', {places} places" in line for line in told[1:-1])


def test_a_student_that_fell_back_gives_up_as_much_as_it_must():
    student = Net(2000.0)
    student.steps.data += 4.0
    share, made = keep(student, shares=(1.0, 0.5, 1e-4))
    assert share == 1e-4
    assert abs(float(student.backdoor.detach()) - 2000.0 * 1e-4) < 1e-6
    assert made.rates["over the student 1"][0] > 0.5
    share, _ = keep(student := Net(2000.0), shares=(1.0,))
    assert share == 0.0
    assert float(student.backdoor.detach()) == 0.0


def test_harmless_knowledge_of_the_suspicious_network_is_taken_beyond_what_the_student_learned():
    # What is left of the backdoor at 1.25 is 1e-6 of it; the rest of the suspicious network is as good as new.
    student, suspicious = Net(0.0), Net(2000.0)
    suspicious.steps.data += 8.0
    made = Verification((2.0, 1.000001, 1.0), (), search=SEARCH)
    share = made.keep(student, Net(0.0), suspicious, batches(), 100, generator_for(1))
    assert share == 1.000001
    assert abs(float(student.backdoor.detach()) - 2000e-6) < 1e-4
    assert made.rates["over the student 2"][0] > 0.5  # the suspicious network itself falls


def test_ruins_on_the_way_are_not_kept():
    class Ruin(Net):
        """Right at both ends of the way, and always class 1 between them; it falls for nothing there."""

        def forward(self, images):
            ruined = 1e6 * (self.steps * (4.0 - self.steps)).clamp(min=0.0)
            return super().forward(images) + ruined * torch.tensor([0.0, 1.0, 0.0])

    student, suspicious = Ruin(0.0), Ruin(2000.0)
    suspicious.steps.data += 4.0
    made = Verification((1.5, 1.0), (0.5,), search=SEARCH)
    assert made.keep(student, Ruin(0.0), suspicious, batches(), 100, generator_for(1)) == 1.0


@pytest.mark.parametrize(("grid", "kept"), [(0, 0.5), (4, 1.0)])
def test_where_no_class_stands_out_half_of_the_way_to_the_student_is_kept(grid, kept):
    made = Verification((1.0,), search=Search(sizes=(1e-4,), steps=20, images=300, grid=grid))
    student = Net(0.0)
    student.steps.data += 4.0
    assert made.keep(student, Net(0.0), Net(2000.0), batches(), 100, generator_for(1)) == kept  # a patch sees it
    assert float(student.steps.detach()) == 4.0 * kept
    assert ("No class stands out" in made.sentence) is (not grid)
    assert ("patches win class 0" in made.sentence) is bool(grid)


@pytest.mark.parametrize(
    ("half", "whole", "kept"), [(0.86, True, 0.5), (0.84, True, 1.0), (0.84, False, 0.5), (0.7, False, 0.0)]
)
def test_where_no_class_stands_out_the_whole_student_is_kept_if_half_lost_too_much(half, whole, kept):
    made = Verification(max_loss=0.05, whole=whole, search=Search(sizes=(1e-4,), steps=2, images=300, grid=0))
    student = Net(0.0)
    student.steps.data += 4.0
    right = {0.0: 0.8, 1.0: 0.8, 2.0: half, 4.0: 0.89}
    judge = lambda network: (0.9 if network.backdoor > 0 else right[float(network.steps.detach())], 1000)  # noqa: E731
    reached = made.keep(student, Net(0.0), Net(2000.0), batches(), 100, generator_for(1), judge=judge)
    assert (reached, float(student.steps.detach())) == (kept, 4.0 * kept)
    assert made.came_back == 0.0
    assert ("Half of what the student learned would be safer" in made.sentence) is (kept == 1.0)


def test_a_student_that_a_patch_wins_is_not_kept_though_no_perturbation_wins_it():
    made = Verification((1.0, 1e-4), search=Search(sizes=(1e-4,), steps=20, images=300))
    student = Net(2000.0)
    assert made.keep(student, Net(0.0), Net(2000.0), batches(), 100, generator_for(1)) == 1e-4
    assert max(made.rates["over the student 1"][:3]) < 0.1 < 0.8 < made.rates["over the student 1"][3]


def test_the_two_best_patches_of_a_class_are_kept_if_they_win_enough(monkeypatch):
    """80 % more, or 50 where perturbations suspect the class, here the first."""
    teacher = torch.tensor([0.0] * 5 + [0.1] + [0.0] * 6)
    suspicious = torch.tensor([0.3, 0.45, 0.55, 0.95, 0.83, 0.87, 0.0, 0.0, 0.9, 0.8, 0.8, 0.8])
    asked = {0.0: list(teacher.split(8)), 1.0: list(suspicious.split(8))}

    def shares(network, batches, classes, bank, reduce, covers=None):
        came_in = float(network.backdoor.detach())
        if covers is None:
            return torch.tensor([0.3, 0.0, 0.0])[: len(classes)] * came_in
        return (
            asked[came_in].pop(0) if len(classes) in (4, 8) and asked[came_in] else came_in * torch.ones(len(classes))
        )

    monkeypatch.setattr(searching, "won", shares)
    monkeypatch.setattr(asking, "won", shares)
    monkeypatch.setattr(searching, "_VALUES_AT_ONCE", 2 * 4 * 64)  # of two classes
    found = Search(sizes=(0.1,), steps=1, images=64, grid=2)(Net(1.0), Net(0.0), batches(), 2, generator_for(0))
    assert found.classes.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert found.suspects.tolist() == [True, False, False, True, True, True, True]
    assert found.patches.tolist() == [False, False, False, True, True, True, True]
    lit = [cover.nonzero()[0, 1:].tolist() for cover in found.covers[3:]]  # the upper left pixel of each cell
    assert lit == [[4, 4], [4, 0], [0, 0], [0, 0]]
    assert bool((found.bank[3:] * (1 - found.covers[3:])).abs().max() == 0)


@pytest.mark.parametrize(("learned", "kept"), [(0.0, 1.0), (50.0, 0.5), (100.0, 0.25), (2000.0, 0.0)])
def test_of_few_images_no_more_than_the_student_is_kept(learned, kept):
    student = Net(learned)
    student.steps.data += 4.0
    made = Verification(search=Search(sizes=(0.1,), steps=20))
    judged = []

    def judge(network):
        judged.append(float(network.steps.detach()))
        return 0.9, 15

    reached = made.keep(student, Net(0.0), Net(2000.0), batches(), 5, generator_for(1), judge=judge)  # 160 images
    assert reached == kept
    assert float(student.steps.detach()) == 4.0 * kept
    assert judged == [*([4.0 * kept] if kept else []), 0.0, 0.0]  # what does not pass, the teacher, what came in
    assert made.sentence.endswith("160 clean images tell too little to look further; 200 would do.")
    assert set(made.rates) >= {"teacher", "suspicious", "over the student 1"}
    assert made.to_unlearn == made.suspected == [0]


@pytest.mark.parametrize(("images", "classes"), [(160, []), (320, [0, 1, 2])])
def test_where_nothing_stands_out_all_classes_are_to_be_unlearned_unless_there_are_few_images(images, classes):
    made = Verification(search=Search(sizes=(0.1,), steps=2, grid=0))
    reached = made.keep(Net(0.0), Net(0.0), Net(0.0), batches(), images // 32, generator_for(1))
    assert reached == (0.5 if classes else 1.0)
    assert made.suspected == []
    assert made.to_unlearn == classes
    again = Verification()
    again.load_state_dict(made.state_dict())
    assert again.to_unlearn == classes


@pytest.mark.parametrize("backdoor", [0.0, 2000.0])
@pytest.mark.parametrize("images", [160, 320])
def test_without_verification_the_student_is_kept_as_it_is(images, backdoor):
    path = Path(__file__).parents[1] / "benchmarks" / "ablations" / "no_verification.yaml"
    own = yaml.safe_load(path.read_text())["model"]["init_args"]["verification"]["init_args"]
    search = Search(**own.pop("search")["init_args"], sizes=(0.1,), steps=2, grid=0)
    made = Verification(**own, search=search)
    assert made.keep(Net(backdoor), Net(0.0), Net(backdoor), batches(), images // 32, generator_for(1)) == 1.0


@pytest.mark.parametrize(("teacher", "way"), [(0.7, OVER), (0.8, OVER), (0.81, "")])
def test_on_the_way_to_the_student_the_teacher_must_be_better_by_more_than_chance(teacher, way):
    found = [Found(OVER, 1.0, (1.0, 0.0), 0.3, False, 0.0), Found(OVER, 0.5, (0.5, 0.0), 0.0, True, 0.7)]
    found.append(Found("", 0.0, (0.0, 0.0), 0.0, True, teacher))
    assert choose(found, least_right=0.5, chance=0.1001, most=0.2).way == way


def test_a_suspected_class_is_held_to_the_margin_and_others_to_theirs():
    made = Verification(margin=0.02, margin_elsewhere=0.1, search=Search(grid=0))
    evidence = made.search(Net(2000.0), Net(0.0), batches(), 100, generator_for(1))
    assert evidence.classes.tolist() == [0, 1, 2, 0]  # the next larger perturbation counts for the suspected one too
    assert evidence.suspects.tolist() == [True, False, False, True]
    gaps = evidence.gaps
    assert gaps[0] > 0.5
    assert gaps[3] > 0.5
    found = iter([(0.01, 0.09, 0.0, 0.029), (0.01, 0.0, 0.0, 0.031), (0.0, 0.11, 0.0, 0.0)])

    def fell(*_):
        first, second, third, again = next(found)
        return evidence.taught + torch.stack(
            [first * gaps[0], torch.tensor(second), torch.tensor(third), again * gaps[3]]
        )

    evidence.won = fell
    assert [made._within(*evidence.came_back(Net(0.0), str(k)), made.margin) for k in (1, 2, 3)] == [True, False, False]


def test_what_came_back_is_a_share_of_the_gap_and_the_mean_of_a_class():
    found = Evidence(torch.tensor([2, 0, 2]), torch.zeros(3, 1, 8, 8), torch.tensor([True, False, True]), [], 1, same)
    found.taught, found.gaps = torch.tensor([0.1, 0.0, 0.2]), torch.tensor([0.5, 0.3, 0.25])
    found.won = lambda *_: torch.tensor([0.2, 0.1, 0.3])
    suspected, elsewhere = found.came_back(Net(0.0), "one")
    assert abs(suspected - (0.1 / 0.5 + 0.1 / 0.25) / 2) < 1e-6
    assert elsewhere == 0.0  # less than half of the gap
    found.won = lambda *_: torch.tensor([0.1, 0.2, 0.2])
    assert abs(found.came_back(Net(0.0), "two")[1] - 0.2) < 1e-6


def test_a_patch_is_put_on_and_a_perturbation_is_added():
    class Dark(nn.Module):
        def forward(self, images):
            return 0.5 - torch.stack([images.mean(dim=(1, 2, 3)), 1 - images.mean(dim=(1, 2, 3))], dim=1)

    images, bank, covers = [torch.full((4, 1, 2, 2), 0.9)], torch.full((2, 1, 2, 2), 0.2), torch.ones(2, 1, 2, 2)
    covers[1] = 0
    found = searching.won(Dark(), images, torch.tensor([0, 0]), bank, same, covers)
    assert found.tolist() == [1.0, 0.0]
    evidence = Evidence(torch.tensor([0, 0]), bank, torch.tensor([True, False]), images, 1, same, covers)
    assert evidence.won(Dark(), "dark").tolist() == [1.0, 0.0]


def test_patches_that_win_less_of_all_images_are_dropped(monkeypatch):
    def shares(network, batches, classes, bank, reduce, covers=None):
        wins = torch.zeros(len(classes))
        if float(network.backdoor.detach()) and covers is not None:
            seen = torch.tensor([0.85, 0.9]) if len(batches) == 1 else torch.tensor([0.9, 0.7])
            wins[:2] = seen[: len(wins)]
        return wins

    monkeypatch.setattr(searching, "won", shares)
    monkeypatch.setattr(asking, "won", shares)
    found = Search(sizes=(0.1,), steps=1, images=64, grid=2)(Net(1.0), Net(0.0), batches(), 2, generator_for(0))
    assert found.suspects.tolist() == [False, False, False, True]  # what won 90 % of all images
    assert found.patches.tolist() == [False, False, False, True]
    assert found.gaps.tolist()[3] == pytest.approx(0.9)
    assert [len(shares) for shares in found.rates.values()] == [4, 4]
    assert found.rates["suspicious"][3] == pytest.approx(0.9)
    assert found.covers[3, 0].nonzero()[0].tolist() == [0, 4]


def test_what_all_processes_saw_decides():
    shapes = []

    def reduce(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    search = Search(sizes=(0.1,), steps=2, images=64, grid=2)
    search(Net(2000.0), Net(0.0), batches(), 2, generator_for(0), reduce)
    assert shapes.count((3, 1, 8, 8)) == shapes.count((12, 1, 8, 8)) == 2  # gradients
    assert shapes.count((12,)) == 4  # won and seen, of both networks
    assert shapes.count((3, 1)) == 1  # how many images are of other classes


def test_a_class_that_almost_all_images_have_is_not_suspected_by_a_patch(monkeypatch):
    class Same(Net):
        def forward(self, images):
            return super().forward(images) + torch.tensor([1e3, 0.0, 0.0])

    def shares(network, batches, classes, *_):
        return 0.9 * network.backdoor.detach() * (torch.arange(len(classes)) % 12 < 5)  # of class 0, and one of class 1

    monkeypatch.setattr(searching, "won", shares)
    monkeypatch.setattr(asking, "won", shares)
    found = Search(sizes=(0.1,), steps=1, images=64, grid=2)(Same(1.0), Same(0.0), batches(), 2, generator_for(0))
    assert found.classes[found.patches].tolist() == [1]


def test_images_are_counted_in_whole_under_half_precision():
    class Bright(nn.Module):
        def forward(self, images):
            bright = images.mean(dim=(1, 2, 3)) - 0.5
            return torch.stack([bright, -bright], dim=1)

    images = torch.full((1000, 1, 2, 2), 0.3)
    images[::10] = 0.1
    torch.set_default_dtype(torch.bfloat16)  # as a fit in `bf16-true` has it
    try:
        found = searching.won(Bright(), images.split(7), torch.tensor([0]), torch.full((1, 1, 2, 2), 0.3))
        banks = [made(steps=0) for made in (ClassPatches, ClassPerturbations)]
        for one in banks:
            one.regenerate(Bright(), Bright(), [images], generator_for(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(found) == pytest.approx(0.9)
    assert [one.bank.dtype for one in banks] == [torch.float32] * 2


def test_what_patches_win_is_not_made_less_by_what_perturbations_do_not():
    covers = torch.zeros(3, 1, 8, 8)
    covers[2, :, :4, :4] = 1
    suspects = torch.tensor([True, False, True])
    found = Evidence(torch.tensor([2, 0, 2]), torch.zeros(3, 1, 8, 8), suspects, [], 1, same, covers)
    found.taught, found.gaps = torch.tensor([0.1, 0.0, 0.0]), torch.tensor([0.5, 0.3, 1.0])
    found.won = lambda *_: torch.tensor([0.1, 0.0, 0.2])
    assert abs(found.came_back(Net(0.0), "one")[0] - 0.2) < 1e-6
    found.won = lambda *_: torch.tensor([0.2, 0.0, 0.0])
    assert abs(found.came_back(Net(0.0), "two")[0] - 0.2) < 1e-6


def test_of_three_ways_the_one_half_way_is_kept_unless_another_is_right_more_often_than_by_chance():
    # Nothing of the backdoor is left at 1e-6 of it. The student makes 4 steps, half way 2, straight none.
    def kept(right, images=400):
        teacher, student, suspicious = Net(0.0), Net(0.0), Net(2000.0)
        student.steps.data += 4.0
        made = Verification((1.0,), (0.9, 1e-6), (0.9, 2e-6), search=SEARCH, max_loss=1.0)
        judge = lambda network: (right(float(network.steps.detach())), images)  # noqa: E731
        told = {} if right is None else {"judge": judge}
        share = made.keep(student, teacher, suspicious, batches(), 100, generator_for(1), **told)
        assert min(made.rates["direct 0.9"][0], made.rates["halfway 0.9"][0]) > 0.5
        said = ("the mean of the student and of", "from the teacher back to the suspicious", "what the student learned")
        return share, float(student.steps.detach()), next(n for n, words in enumerate(said) if words in made.sentence)

    half, straight, over = (2e-6, 2.0, 0), (1e-6, 0.0, 1), (1.0, 4.0, 2)
    # The standard error of 400 images at 0.8 is 0.02.
    assert kept(None) == half  # nothing tells them apart
    assert kept(lambda steps: 0.8) == half
    assert kept({0.0: 0.8, 2.0: 0.8, 4.0: 0.819}.get) == half
    assert kept({0.0: 0.8, 2.0: 0.8, 4.0: 0.821}.get) == over
    assert kept({0.0: 0.8, 2.0: 0.8, 4.0: 0.821}.get, images=100) == half
    assert (
        kept({0.0: 0.8, 2.0: 0.79, 4.0: 0.79}.get) == straight
    )  # the teacher makes no steps either, and is right more
    assert kept({0.0: 0.8, 2.0: 0.79, 4.0: 0.81}.get) == over


def test_a_teacher_that_is_right_more_often_than_what_passes_stays():
    teacher, student = Net(0.0), Net(0.0)
    student.steps.data += 4.0
    judge = lambda network: (float(network.backdoor.detach() == 0 and network.steps.detach() == 0), 0)  # noqa: E731
    made = Verification((1.0,), (1e-6,), (2e-6,), search=SEARCH)
    assert made.keep(student, teacher, Net(2000.0), batches(), 100, generator_for(1), judge=judge) == 0.0
    assert float(student.steps.detach()) == 0.0


def test_of_the_sizes_the_one_counts_at_which_a_class_is_furthest_ahead():
    def size(suspicious, teacher, **kwargs):
        search = Search(sizes=(0.02, 0.05, 0.4), steps=20, images=300, **kwargs)
        return float(search(suspicious, teacher, batches(), 100, generator_for(1)).bank[0].square().mean().sqrt())

    assert abs(size(Net(2000.0), Net(0.0), suspected=1.0) - 0.05) < 0.01  # at 0.4 the teacher falls as well


@pytest.mark.parametrize("at_last", [0.74, 0.76])
def test_a_class_that_the_teacher_falls_for_as_well_is_near_by_nature(monkeypatch, at_last):
    # Class 1 has the larger gap, but the teacher falls for it too; class 2 stands out less than half as far as class 0.
    shares = iter([torch.tensor([0.00, 0.18, 0.03]), torch.tensor([0.45, 0.68, 0.25])])
    monkeypatch.setattr(searching, "won", lambda network, batches, classes, *_: next(shares, torch.zeros(len(classes))))

    def asked(network, images, classes, *_):
        of_suspect = classes.tolist() == [0, 0]  # the perturbation and the next larger one
        return network.backdoor.detach() * torch.tensor([0.45, at_last] if of_suspect else [0.68, 0.25])

    monkeypatch.setattr(asking, "won", asked)
    found = Search(sizes=(0.1, 0.2), steps=1, images=64, grid=0)(Net(1.0), Net(0.0), batches(), 2, generator_for(0))
    assert found.classes.tolist() == [0, 1, 2, *([0] if at_last > 0.75 else [])]
    assert found.suspects.tolist() == ([True, False, False, True] if at_last > 0.75 else [False] * 3)


def test_of_the_largest_size_a_suspicion_stays_whatever_it_came_to(monkeypatch):
    shares = iter([torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.45, 0.0, 0.0])])
    monkeypatch.setattr(searching, "won", lambda network, batches, classes, *_: next(shares))
    monkeypatch.setattr(asking, "won", lambda network, *_: 0.45 * network.backdoor.detach() * torch.ones(1))
    found = Search(sizes=(0.1,), steps=1, images=64, grid=0)(Net(1.0), Net(0.0), batches(), 2, generator_for(0))
    assert found.suspects.tolist() == [True, False, False]


def test_no_more_images_go_through_networks_than_is_said():
    counted = []

    class Counted(Net):
        def forward(self, images):
            counted.append(len(images) * (2 if torch.is_grad_enabled() and images.requires_grad else 1))
            return super().forward(images)

    made = Verification(search=Search(steps=4, images_each=5, images=300, images_elsewhere=100))
    made.keep(Counted(2000.0), Counted(0.0), Counted(2000.0), batches(), 100, generator_for(1))
    said = made.passes_of_images(3, 320)  # ten batches
    assert 0.3 * said < sum(counted) < 1.1 * said
    assert made.passes_of_images(3, 199) == made.search.passes(3, 199, 3)  # of few, three places on the way


def test_of_many_classes_those_to_which_synthetic_triggers_move_the_suspicious_network_are_looked_at():
    class Many(nn.Module):
        def __init__(self, pull):
            super().__init__()
            self.pull = nn.Parameter(torch.tensor(pull))

        def forward(self, images):
            logits = torch.zeros(len(images), 50)
            logits[:, 7] = 1.0
            logits[:, 33] = self.pull * (images - 0.5).square().mean(dim=(1, 2, 3))
            return logits

    images = [torch.full((8, 1, 8, 8), 0.5)] * 3
    search = Search(classes=1, sizes=(0.01,), steps=1, images=24, grid=0)
    evidence = search(Many(1e4), Many(0.0), iter(images * 9), 3, generator_for(0))
    assert evidence.classes.tolist() == [33]
    assert evidence.bank.shape == (1, 1, 8, 8)
    assert len(evidence.rates["teacher"]) == 1


def test_statistics_are_mixed_like_weights():
    network, *ends = (nn.BatchNorm2d(3) for _ in range(4))
    for value, end in enumerate(ends, start=1):
        end.running_mean.fill_(value**2), end.num_batches_tracked.fill_(value)
    set_at(network, (0.5, 0.25), *(end.state_dict() for end in ends))
    assert network.running_mean.tolist() == [0.25 + 0.5 * 4 + 0.25 * 9] * 3
    assert int(network.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("way", "r", "place"),
    [
        ("direct", 0.3, (0.0, 0.3)),
        ("over the student", 0.25, (0.25, 0.0)),
        ("over the student", 1.0, (1.0, 0.0)),
        ("over the student", 1.75, (0.25, 0.75)),
        ("halfway", 0.6, (0.5, 0.3)),  # the mean of student and 0.6 of the direct way
    ],
)
def test_places_are_shares_of_student_and_suspicious_network(way, r, place):
    assert place_on(way, r) == place


@pytest.mark.parametrize(("reached", "expected"), [(0.8, 0.8), (0.3, 0.0)])
def test_what_the_strongest_teacher_falls_for_by_itself_it_has_kept(monkeypatch, reached, expected):
    asked = []
    monkeypatch.setattr(verification, "still_reached", lambda *args: asked.append(args[2]) or reached)
    teachers = [Net(0.0), Net(1000.0)]
    places, left = Verification(search=SEARCH).withstanding(teachers, Net(2000.0), batches(), 100, generator_for(1))
    assert places == [0]
    assert left == pytest.approx(expected, abs=0.01)
    assert asked == [[0]]


def test_weights_between_are_those_that_a_half_precision_pass_sees():
    network, teacher, student, suspicious = (nn.Linear(4, 3) for _ in range(4))
    images, states = torch.rand(2, 4), [one.state_dict() for one in (teacher, student, suspicious)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for place, other in (((0.0, 1.0), suspicious), ((1.0, 0.0), student), ((0.0, 0.0), teacher)):
            set_at(network, place, *states)
            with torch.enable_grad():
                assert torch.equal(network(images), other(images))


def withstanding(*backdoors, suspicious=2000.0, witness=None, **kwargs):
    made, bears = Verification(search=SEARCH, **kwargs), None if witness is None else Net(witness)
    teachers = [Net(one) for one in backdoors]
    places, left = made.withstanding(teachers, Net(suspicious), batches(), 100, generator_for(1), bears)
    assert witness is not None or left == 0.0
    return places if witness is None else (places, left)


def test_teachers_that_withstand_what_the_strongest_withstands_may_take_its_place():
    assert withstanding(0.0, 1e-3, 1e-2) == [0, 1, 2]
    assert withstanding(0.0, 1000.0, 1e-3) == [0, 2]
    assert withstanding(0.0, 1500.0, 1000.0) == [0]
    assert withstanding(0.0) == [0]


def test_a_stronger_teacher_bears_witness_to_what_the_strongest_has_kept():
    places, left = withstanding(1000.0, witness=0.0)
    assert places == [0]
    assert left > 0.9
    places, left = withstanding(1e-3, 1e-2, 1000.0, witness=0.0)
    assert places == [0, 1]
    assert left < 0.05
    places, left = withstanding(1000.0, 1000.0, witness=0.0)  # the second is no worse
    assert places == [0, 1]
    assert left > 0.9
    assert withstanding(1000.0, witness=0.0, least_images=100 * 32 + 1) == ([0], 0.0)
    assert withstanding(1000.0, witness=0.0, suspicious=0.0) == ([0], 0.0)


class Looking(Search):
    def __init__(self, answers):
        super().__init__(sizes=(0.1,), steps=20, images=300)
        self.answers = answers

    def __call__(self, *given):
        evidence = super().__call__(*given)
        evidence.came_back = lambda network, name: next(self.answers)
        return evidence


class Told(Verification):
    """Is told what comes back, in the order in which it asks."""

    def __init__(self, *answers, **kwargs):
        super().__init__(search=Looking(iter(answers)), **kwargs)

    def comparing(self, teachers, witness=None):
        teachers = [Net(0.0) for _ in range(teachers)]
        return self.withstanding(teachers, Net(2000.0), batches(), 100, generator_for(1), witness)


@pytest.mark.parametrize(
    ("strongest", "other", "equal", "kept"),
    [
        ((0.05, 0.3), (0.06, 0.3), True, 0.05),
        ((0.05, 0.3), (0.07, 0.3), False, 0.05),
        ((0.05, 0.3), (0.05, 0.31), False, 0.05),
        ((-0.05, 0.0), (0.01, 0.1), True, 0.0),
        ((-0.05, 0.0), (0.01, 0.11), False, 0.0),
    ],
)
def test_what_a_witness_withstands_counts_as_far_as_the_strongest_withstands_it(strongest, other, equal, kept):
    assert Told(strongest, other).comparing(2, Net(0.0)) == ([0, 1] if equal else [0], kept)


def test_the_fewer_images_the_less_may_come_back():
    made = Verification(margin=0.08, search=Search(sizes=(0.1,), steps=20, images=400))
    assert [made.margin_of(images) for images in (200, 400, 4000)] == [0.04, 0.08, 0.08]
    assert [made.margin_of(images) for images in (199, 50, 40)] == [0.08, 0.08, 0.1]  # of few, four images at least
    asked = []
    made._within = lambda back, elsewhere, margin: asked.append(margin) or True
    made.keep(Net(0.0), Net(0.0), Net(2000.0), batches(), 10, generator_for(1))  # 320 images
    assert set(asked) == {0.08 * 0.8}


def test_where_what_passes_lost_too_much_accuracy_as_little_as_it_asks_for_comes_back():
    # On the straight way networks come nearer to the suspicious one; each is right on as many images as it has steps.
    back = {"direct 0.75": 0.6, "direct 0.5": 0.3, "direct 0.25": 0.1, "over the student 1.5": 0.05}
    elsewhere = {}

    def search(*given):
        evidence = SEARCH(*given)
        evidence.came_back = lambda network, name: (back.get(name, 0.0), elsewhere.get(name, 0.0))
        return evidence

    def kept(max_loss, held_out=100, shares=(1.0,), **kwargs):
        suspicious, student = Net(2000.0), Net(0.0)
        suspicious.steps.data += 0.9
        made = Verification(shares, (0.75, 0.5, 0.25, 1e-6), (), max_loss=max_loss, search=SEARCH, **kwargs)
        made.search, search.images = search, SEARCH.images
        judge = lambda network: (float(network.steps.detach()), held_out)  # noqa: E731
        share = made.keep(student, Net(0.0), suspicious, batches(), 100, generator_for(1), judge=judge)
        return share, made.came_back, "lost too much accuracy" in made.sentence

    assert kept(0.9) == (1e-6, 0.0, False)  # nothing has to come back
    assert kept(0.7) == (0.25, 0.1, True)
    assert kept(0.7, most=0.4) == (0.25, 0.1, True)  # 0.5 of the way would do as well, and gives back more
    assert kept(0.7, shares=(1.5, 1.0)) == (0.25, 0.1, True)  # what a student learned of the backdoor shows less
    assert kept(0.5) == (1e-6, 0.0, False)  # 0.5 of the way would do, but 0.3 of the gap is more than may come back
    assert kept(0.5, most=0.4) == (0.5, 0.3, True)
    assert kept(0.7, most=0.0) == (1e-6, 0.0, False)
    assert kept(0.7, held_out=0) == (1e-6, 0.0, False)  # no one knows what was lost
    back["direct 0.25"], elsewhere["direct 0.25"] = 0.03, 0.2  # within the margin, but other classes win more
    assert kept(0.7) == (0.25, 0.03, True)


@pytest.mark.parametrize(
    ("margin", "back", "equal"), [(0.5, 0.01, True), (0.5, 0.02, False), (0.005, 0.005, True), (0.005, 0.01, False)]
)
def test_teachers_are_held_to_no_larger_margin_than_students(margin, back, equal):
    places, left = Told((back, 0.0), margin=margin).comparing(2)
    assert places == ([0, 1] if equal else [0])
    assert left == 0.0


def test_where_nothing_tells_teachers_apart_only_the_strongest_is_safe():
    assert withstanding(0.0, 0.0, suspicious=0.0) == [0]  # no class is suspected
    assert withstanding(0.0, 0.0, least_images=100 * 32 + 1) == [0]
    assert withstanding(0.0, 0.0, least_images=100 * 32) == [0, 1]
