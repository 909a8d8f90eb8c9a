"""What holds for every scan: the network stays as it was, bad input is refused, results are plain."""

import json

import pytest
import torch
from torch import nn

from nba_lightning.io.adapters import Normalized
from nba_lightning.networks import SmallCNN
from nba_lightning.scan import ClassShift, Conformal, MaximumMargin, Scan, ScanResult, TeacherDisagreement, sentence
from nba_lightning.scan.base import Reservoir, images_of
from tests.scan.zoo import PixelGroups, same, snapshot


def scans():
    torch.manual_seed(5)
    teacher = SmallCNN(width=4, in_channels=1, num_classes=4)
    return [MaximumMargin(starts=2, steps=3), ClassShift(), TeacherDisagreement(teacher, rms=(0.1,), steps=2)]


def loader(classes=4):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(16) % classes
    images = torch.rand((16, 1, 8, 8), generator=generator)
    return [(images[:9], labels[:9]), (images[9:], labels[9:])]


@pytest.mark.parametrize("scan", scans(), ids=lambda scan: scan.name)
@pytest.mark.parametrize("inference", [False, True])
def test_the_network_is_left_as_it_was(scan, inference):
    network = SmallCNN(width=4, in_channels=1, num_classes=4)
    network(torch.rand(4, 1, 8, 8)).sum().backward()
    network.train()
    network.block2.eval()
    network.block1.requires_grad_(False)
    before = snapshot(network)
    with torch.inference_mode(inference):
        result = scan(network, loader())
    assert same(before, snapshot(network))
    assert len(result.statistics) == len(result.p_values) == 4
    assert result.passes > 0


@pytest.mark.parametrize("scan", scans(), ids=lambda scan: scan.name)
def test_a_scan_depends_on_its_seed_alone(scan):
    network = SmallCNN(width=4, in_channels=1, num_classes=4)
    first = scan(network, loader())
    torch.manual_seed(99)
    assert scan(network, loader()).statistics == first.statistics


@pytest.mark.parametrize("scan", scans(), ids=lambda scan: scan.name)
def test_results_are_plain_json_and_back(scan):
    result = scan(SmallCNN(width=4, in_channels=1, num_classes=4), loader())
    saved = json.loads(json.dumps(result.to_dict()))
    assert [row["class"] for row in saved["classes"]] == [0, 1, 2, 3]
    assert saved["verdict"] == sentence(result)
    again = ScanResult.from_dict(saved)
    assert again.to_dict() == saved
    assert (again.suspect, again.p_value) == (result.suspect, result.p_value)


@pytest.mark.parametrize("scan", scans(), ids=lambda scan: scan.name)
def test_bad_input_is_refused(scan):
    with pytest.raises(ValueError, match="at least 3 classes"):
        scan(SmallCNN(width=4, in_channels=1, num_classes=2), loader(2))
    broken = SmallCNN(width=4, in_channels=1, num_classes=4)
    broken.block2[1].running_var[1] = float("nan")
    with pytest.raises(ValueError, match=r"finite weights, but got NaN or infinity in block2\.1\.running_var"):
        scan(broken, loader())
    network = SmallCNN(width=4, in_channels=1, num_classes=4)
    with pytest.raises(ValueError, match="`loader` to hold images, but got none"):
        scan(network, [])
    with pytest.raises(ValueError, match="`loader` to hold images, but got none"):
        scan(network, [(torch.zeros(0, 1, 8, 8), torch.zeros(0))])
    with pytest.raises(ValueError, match=r"values in \[0, 1\], but got values from"):
        scan(network, [(3 * torch.randn(4, 1, 8, 8), torch.arange(4))])
    with pytest.raises(ValueError, match="`loader` to be given"):
        scan(network)
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\)"):
        scan(network, [(torch.rand(4, 3, 8, 8), torch.arange(4))])


def test_a_reservoir_is_fair_to_a_stream_that_is_sorted_by_class():
    kept = [Reservoir(40, seed) for seed in range(50)]
    for reservoir in kept:
        for label in range(10):
            reservoir.add(torch.full((30, 1, 1, 1), float(label)), torch.full((30,), label))
    counts = torch.stack([reservoir.content()[1].bincount(minlength=10) for reservoir in kept]).double().mean(dim=0)
    assert kept[0].seen == 300
    assert counts.sum() == 40
    assert counts.tolist() == pytest.approx([4.0] * 10, abs=1.2)  # four standard errors
    images, labels = kept[0].content()
    assert images.flatten().tolist() == labels.tolist()


def test_batches_of_all_kinds_become_images_and_labels():
    network, images, labels = nn.Identity(), torch.rand(3, 1, 2, 2), torch.tensor([0, -1, 2])
    for batch in ((images, labels), [images, labels], {"image": images, "label": labels}):
        found, known = images_of(batch, network)
        assert torch.equal(found, images[[0, 2]])  # a label of -1 is padding
        assert known.tolist() == [0, 2]
    for batch in (images, (images,), {"pixel_values": images}):
        found, known = images_of(batch, network)
        assert torch.equal(found, images)
        assert known is None
    bytes_, _ = images_of((torch.full((2, 1, 2, 2), 255, dtype=torch.uint8), labels[:2]), network)
    assert bytes_.max() == 1.0
    normalised = Normalized(PixelGroups([1.0, 2.0, 3.0]), [0.5], [0.25], loaders_normalize=True)
    found, _ = images_of(((images - 0.5) / 0.25, labels), normalised)
    assert torch.allclose(found, images[[0, 2]])


def test_a_network_whose_answers_are_objects_in_half_precision_is_scanned():
    class Answer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = PixelGroups([1.0, 2.0, 6.0])

        def forward(self, images):
            return {"logits": self.inner(images)}

    result = MaximumMargin(starts=3)(Answer().to(torch.bfloat16), image_shape=(1, 3, 4))
    assert result.statistics == pytest.approx([1.0, 2.0, 6.0], rel=0.03)


def test_a_sentence_says_no_more_than_the_result():
    def said(*p_values, **arguments):
        return sentence(ScanResult("maximum_margin", (1.0,) * len(p_values), p_values, "a rule"), **arguments)

    assert said(0.8, 0.004, 0.6) == "Class 1 is reached unusually easily (p = 0.004)."
    assert said(0.8, 0.004, 0.6, names=["cat", "dog", "cow"]) == "Class dog is reached unusually easily (p = 0.004)."
    assert said(0.02, 0.00005, 0.6) == "Classes 1 (p < 0.001) and 0 (p = 0.02) are reached unusually easily."
    nothing = said(0.8, 0.3125, 0.6)
    assert nothing == "No class is reached unusually easily (smallest p = 0.31), which proves nothing."
    assert said(0.8, 0.3125, 0.6, level=0.4).startswith("Class 1 is")
    for text in (nothing, said(0.8, 0.004, 0.6), said(0.01, 0.01, 0.01)):
        assert "backdoor" not in text
    with pytest.raises(ValueError, match="`names` to be one for each of the 3 classes"):
        said(0.1, 0.2, 0.3, names=["cat"])
    with pytest.raises(ValueError, match="`level`"):
        said(0.1, 0.2, 0.3, level=1.0)


def test_results_can_be_judged_by_reference_networks():
    result = ScanResult("maximum_margin", (1.0, 9.0, 1.1), (1.0, 0.004, 0.9), "a rule")
    judged = result.judged_by(Conformal([[0.9 + i % 3 / 10, 8.5 + i / 10, 1.2 - i % 2 / 5] for i in range(9)]))
    assert judged.statistics == result.statistics
    assert judged.p_value > 0.1  # natural: every network has it
    assert judged.rule == "conformal, 9 reference networks"
    with pytest.raises(ValueError, match=r"`p_values` to be as many as `statistics` \(3\)"):
        ScanResult("maximum_margin", (1.0, 2.0, 3.0), (0.1,), "a rule")
    with pytest.raises(ValueError, match="`settings` to be made of plain values"):
        ScanResult("maximum_margin", (1.0,), (0.1,), "a rule", settings={"x": torch.zeros(1)})


def test_every_scan_says_what_it_cannot_see():
    for scan in scans():
        text = " ".join((type(scan).__doc__ or "").split())
        assert "It cannot see" in text
        assert "all-to-all" in text
        assert "Source:" in text
    assert "proves nothing" in (Scan.__doc__ or "").replace("\n    ", " ")
