import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from nba_lightning.app.cli import main
from nba_lightning.app.report import write_report
from nba_lightning.app.report_classes import MOST
from nba_lightning.app.report_figures import curves, interval, number_axis, share_axis, spans
from nba_lightning.app.report_loading import loading_lines
from nba_lightning.app.report_pictures import SHOWN, attention_samples, pseudo_samples
from nba_lightning.app.report_reading import Accuracy, Entry, Scan, ScanRow
from nba_lightning.app.report_sentences import accuracy_sentence, duration, not_shown, p_text, points, scan_sentence
from nba_lightning.io.weights import save_weights

NAMES = ["cat", "<b>x</b>", "truck"]
MINIMAL = {"accuracy": {"suspicious": {"value": 0.95}, "cleaned": {"value": 0.94}}}


def accuracy(value, images=100, **more):
    error = math.sqrt(value * (1 - value) / images)
    return {"value": value, "standard_error": error, "images": images, **more}


def scan(*p_values, method="maximum_margin"):
    rows = [{"class": k, "statistic": 1.0 + 9.0 * (p < 0.05), "p_value": p} for k, p in enumerate(p_values)]
    return {"classes": {method: rows}, "verdict": {method: "A sentence of the scan."}}


def whole():
    per_class = [{"class": k, "value": 0.5 + 0.1 * k, "images": 30} for k in range(3)]
    return {
        "accuracy": {
            "suspicious": accuracy(0.9, held_out=True, per_class=per_class),
            "teacher": accuracy(0.85, held_out=True),
            "cleaned": accuracy(0.88, held_out=True, per_class=per_class),
        },
        "scan": {"before": scan(0.7, 0.9, 0.004), "after": scan(0.6, 0.9, 0.5)},
        "chosen": {"optimiser": "AdamW", "layers": ["a", "b"], "reasons": {"optimiser": "It suits the network."}},
        "weights": {"file": "cleaned.safetensors", "handed_over": True},
        "warnings": ["A warning."],
        "curves": [{"fit": "student", "epoch": e, "val/acc": 0.8, "loss": 2.0 / e} for e in (1, 2, 3)],
        "classes": NAMES,
        "versions": {"torch": "2.6"},
        "provenance": {"device": "a device"},
        "seconds": 4000,
        "seed": 7,
        "of_a_later_version": {"unknown": 1},
    }


def answer(label, probability=0.9):
    return {"class": label, "probability": probability}


def write_pictures(folder, count=2, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (count, channels, 8, 8), dtype=torch.uint8, generator=generator)
    maps = torch.rand((count, 2, 2), generator=generator)
    samples = [
        {"class": "cat", "target": 2, "suspicious": answer("truck"), "cleaned": answer(0, 0.6)} for _ in range(count)
    ]
    (folder / "report").mkdir()
    save_weights({"images": images, "perturbed": images + 5}, folder / "report" / "pseudo.safetensors")
    save_weights({"images": images, "suspicious": maps, "cleaned": maps}, folder / "report" / "attention.safetensors")
    (folder / "report" / "pseudo.json").write_text(json.dumps({"samples": samples}))
    (folder / "report" / "attention.json").write_text(json.dumps({"samples": samples, "layer": "layer3"}))
    return images, maps


def page(folder, content):
    (folder / "report.json").write_text(json.dumps(content))
    return write_report(folder).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All tags with their attributes; those of a well-formed page close in order."""

    EMPTY = {"meta", "img"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


SECTIONS = ["accuracy", "scan", "pseudo", "attention", "curves", "chosen", "not-shown", "weights", "provenance"]


def test_a_page_has_every_part_and_links_to_it(tmp_path):
    write_pictures(tmp_path)
    text = page(tmp_path, whole())
    tags = Tags(text).found
    assert [attrs["id"] for tag, attrs in tags if tag == "section"] == SECTIONS
    assert [attrs["href"] for tag, attrs in tags if tag == "a"] == [f"#{name}" for name in SECTIONS]
    for shown in ("A warning.", "AdamW", "It suits the network.", "layer3", "a device", "67 min", "A sentence of the"):
        assert shown in text
    assert list(tmp_path.glob(".*")) == []  # the unfinished page is gone


def test_a_page_is_self_contained_and_every_picture_has_words(tmp_path):
    write_pictures(tmp_path)
    tags = Tags(page(tmp_path, whole())).found
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    for tag, attrs in tags:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert attrs.get("href", "#").startswith("#")
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg" and attrs.get("role") == "img":
            assert attrs["aria-label"]
    assert "://" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_untrusted_text_is_escaped_wherever_it_stands(tmp_path):
    write_pictures(tmp_path)
    evil = '"><script>alert(1)</script>'
    content = whole()
    content["classes"] = [evil, "<b>x</b>", evil]
    content["warnings"] = [evil]
    content["weights"] = {
        "file": evil,
        "handed_over": False,
        "reason": evil,
        "next": evil,
        "network": evil,
        "size": evil,
    }
    content["chosen"] = {evil: evil, "reasons": {evil: evil}}
    content["provenance"] = {evil: evil}
    content["curves"] = [{"fit": evil, "epoch": 1, f"acc{evil}": 0.5}]
    content["scan"]["before"] = scan(0.7, 0.9, 0.004, method=evil) | {"verdict": evil}
    samples = {"samples": [{"class": evil, "source": evil, "cleaned": answer(evil), "caption": evil}] * 2}
    for stem in ("pseudo", "attention"):
        (tmp_path / "report" / f"{stem}.json").write_text(json.dumps(samples | {"layer": evil}))
    text = page(tmp_path, content)
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "script" not in {tag for tag, _ in Tags(text).found}


def test_names_that_are_no_valid_text_do_not_stop_the_report(tmp_path):
    assert "x?y" in page(tmp_path, whole() | {"classes": ["x\udce9y", "b", "c"]})


def test_the_minimal_report_leaves_out_what_is_missing(tmp_path):
    text = page(tmp_path, MINIMAL)
    tags = Tags(text).found
    assert [attrs["id"] for tag, attrs in tags if tag == "section"] == ["accuracy", "not-shown", "weights"]
    assert "No scan was made" in text
    assert "intervals" not in text.split('id="not-shown"')[0].split("</style>")[1]
    assert "network = ...  # as you made it" in text


def test_a_rejected_network_is_said_at_the_top_and_never_called_cleaned(tmp_path):
    weights = {
        "file": "rejected.safetensors",
        "handed_over": False,
        "reason": "It lost 40 points.",
        "next": "Try less.",
    }
    text = page(tmp_path, whole() | {"weights": weights | {"next": "Try less."}})
    top = text.split("<nav")[0]
    assert "<h1>This network is not handed over as cleaned</h1>" in top
    assert "It lost 40 points." in top
    assert "Try less." in top
    assert '<span class="key cleaned" aria-hidden="true"></span>rejected' in text
    assert "</span>cleaned" not in text


@pytest.mark.parametrize(("file", "title"), [("rejected", "not handed over"), ("cleaned", "What the cleaning did")])
def test_without_a_word_on_the_weights_the_files_say_whether_they_were_handed_over(tmp_path, file, title):
    (tmp_path / f"{file}.safetensors").touch()
    text = page(tmp_path, MINIMAL)
    assert title in text.split("<h1>")[1].split("</h1>")[0]
    assert f"load_file(&#34;{file}.safetensors&#34;)" in text


def without(content, *path):
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"accuracy": ', "Expected `report.json` to be a whole JSON file, but got a broken one"),
        ("\xff", "Expected `report.json` to be a whole JSON file"),
        ("[" * 100_000, "Expected `report.json` to be a whole JSON file"),
        ("[]", r"Expected `report.json` to be an object in report.json, but got \[\]"),
        ("{}", "Expected `accuracy` to be an object in report.json, but got none"),
        (json.dumps(without(MINIMAL, "accuracy", "cleaned")), "Expected `accuracy.cleaned` to be an object"),
        (
            json.dumps(without(MINIMAL, "accuracy", "suspicious", "value")),
            r"Expected `accuracy.suspicious.value` to be a number in \[0, 1\] in report.json, but got none",
        ),
        ('{"accuracy": {"suspicious": {"value": 95.0}, "cleaned": {"value": 0.9}}}', r"in \[0, 1\].*, but got 95.0"),
        ('{"accuracy": {"suspicious": {"value": NaN}, "cleaned": {"value": 0.9}}}', r"in \[0, 1\].*, but got NaN"),
        ('{"accuracy": {"suspicious": {"value": true}, "cleaned": {"value": 0.9}}}', r"in \[0, 1\].*, but got true"),
        (json.dumps(MINIMAL | {"warnings": "one"}), 'Expected `warnings` to be a list in report.json, but got "one"'),
        (json.dumps(MINIMAL | {"curves": [{"fit": "a"}]}), r"Expected `curves\[0\].epoch` to be a number in"),
        (
            json.dumps(MINIMAL | {"scan": {"before": {"classes": {"m": [{"class": 0, "p_value": 7}]}}}}),
            r"Expected `scan.before.classes.m\[0\].p_value` to be a number in \[0, 1\]",
        ),
        (
            json.dumps(MINIMAL | {"scan": {"before": {"classes": [{"statistic": 1.0}]}}}),
            r"Expected `scan.before.classes\[0\].class` to be a class",
        ),
    ],
)
def test_a_broken_file_is_named_in_one_sentence_and_writes_nothing(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_the_page_or_says_what_it_expects(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(MINIMAL))
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'report.html'}\n"
    with pytest.raises(SystemExit, match=r"Expected `report.json` to be in the folder that `clean` wrote, but there"):
        main(["report", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"Expected `folder`; `nba-lightning report --help` says what is meant"):
        main(["report"])


@pytest.mark.parametrize(
    ("value", "images", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 1998, table I
    [
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_wilsons_also_from_the_standard_error(value, images, low, high):
    for error in (None, math.sqrt(value * (1 - value) / images)):
        ends = interval(Accuracy(value, error, images))
        assert ends == pytest.approx((low, high), abs=5e-5)
    assert interval(Accuracy(1 - value, None, images)) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_an_interval_needs_images_and_uses_the_standard_error_where_both_are_known():
    assert interval(Accuracy(0.5)) is None
    assert interval(Accuracy(0.5, None, 0)) is None
    assert interval(Accuracy(1.0, 0.0, 10)) == pytest.approx((0.7225, 1.0), abs=1e-4)  # not empty at 100 %
    of_pairs = interval(Accuracy(0.5, 0.1, 1000))  # 25 independent images' worth
    assert of_pairs == pytest.approx(interval(Accuracy(0.5, None, 25)))


def test_the_figure_draws_intervals_where_its_axis_has_these_values(tmp_path):
    axis, rows = spans({"a": {"suspicious": Accuracy(0.9, None, 100)}, "b": {"cleaned": Accuracy(0.7, None, 50)}})
    assert (axis.low, axis.high) == (0.5, 1.0)
    (span,) = rows["a"]
    low, high = interval(Accuracy(0.9, None, 100))
    assert span.x == 80.0
    assert span.x_interval == (round(200 * (low - 0.5), 2), round(200 * (high - 0.5), 2))
    text = page(tmp_path, {"accuracy": {"suspicious": accuracy(0.9), "cleaned": accuracy(0.7, 50)}})
    assert f'<line x1="{span.x_interval[0]}%" x2="{span.x_interval[1]}%" y1="22" y2="22"/>' in text
    assert f"{100 * low:.1f} to {100 * high:.1f}\u00a0%" in text


def test_axes_hold_their_values_and_have_ticks():
    for values in ([0.0], [0.03], [1.0], [0.3, 0.99], [0.95]):
        axis = share_axis(values)
        assert all(0 <= axis.at(value) <= 100 for value in values)
        assert axis.ticks[-1] == (100.0, "100\u00a0%")
        assert len(axis.ticks) >= 3
    for values in ([1.0], [0.0], [-5.0, 3.0], [1e-9, 1e9], [0.1, 0.7], [1e6, 1e6 + 1], [0.0, 400.0], [7.0, 29.0]):
        axis = number_axis(values)
        assert all(0 < axis.at(value) < 100 for value in values)
        assert len(axis.ticks) >= 1
        assert all(0 <= x <= 100 for x, _ in axis.ticks)
    assert number_axis([1.0, 100.0]).at(10.0) == 50.0  # logarithmic
    assert [text for _, text in number_axis([1.0, 100.0]).ticks] == ["1", "2", "5", "10", "20", "50", "100"]


def test_curves_are_split_by_kind_and_broken_where_a_number_is_missing():
    rows = [
        {"fit": "student", "epoch": e, "val/acc": a, "loss": 1.0, "text": "x", "lr": 0.1}
        for e, a in enumerate([0.5, math.nan, 0.75, 1.0])
    ]
    found = curves([Entry(row, "curves", "report.json") for row in rows])
    accuracies, losses = found["student"]
    assert (accuracies.title, losses.title, accuracies.epochs) == ("accuracy", "loss", (0, 3))
    (line,) = accuracies.lines
    assert (line.name, line.last) == ("val/acc", "100.0\u00a0%")
    assert line.path == "M0 100h0M66.67 50h0L100 0"  # the axis is from 50 to 100 %
    assert [line.name for line in losses.lines] == ["loss"]
    assert curves([Entry({"epoch": 1, "acc": 0.5}, "", "")])["fit"][0].lines[0].path.startswith("M50 ")


def rows_of(*p_values):
    return [ScanRow(f"class {k}", 1.0, p) for k, p in enumerate(p_values)]


def test_sentences_say_what_the_scans_found_and_no_more():
    before = Scan({"maximum_margin": [ScanRow("3", 9.0, 0.004), ScanRow("1", 1.0, 0.9)]}, {}, 0.05)
    after = Scan({"maximum_margin": [ScanRow("3", 1.0, 0.31), ScanRow("1", 1.0, 0.9)]}, {}, 0.05)
    said = scan_sentence(before, after).replace("\u00a0", " ")
    assert said == (
        "Before the cleaning, class 3 was reached unusually easily (p = 0.004); "
        "after it, no class is reached unusually easily (smallest p = 0.31)."
    )
    two = Scan({"a": before.methods["maximum_margin"], "b": after.methods["maximum_margin"]}, {}, 0.05)
    assert "class 3 was reached unusually easily (by 1 of 2 methods, smallest p" in scan_sentence(two, after)
    assert scan_sentence(after, after).startswith("Neither before the cleaning nor after it is a class")
    assert "the other one was not scanned" in scan_sentence(before, None)
    many = Scan({"m": [ScanRow(str(k), 1.0, 0.01) for k in range(5)]}, {}, 0.05)
    assert scan_sentence(many, after).count("p\u00a0=") == 3
    assert "and 3 more were reached unusually easily" in scan_sentence(many, after)
    nothing = Scan({}, {}, 0.05)  # a scan without a p-value found nothing out, which is not the same as nothing
    assert "no class" not in scan_sentence(nothing, nothing)
    for text in (said, *not_shown({"cleaned": Accuracy(0.9)}, [before, after], True)):
        assert not re.search(r"\b(backdoored|safe|secure|clean network)\b", text)


def test_levels_and_false_alarms_are_the_scans_own():
    loose = Scan({"a": rows_of(0.08), "b": rows_of(0.5)}, {}, 0.1)
    assert list(loose.unusual()) == ["class 0"]
    assert "2 methods at p ≤ 0.1 name a class in up to 20\u00a0%" in " ".join(
        not_shown({"cleaned": Accuracy(1.0)}, [loose], False)
    )


def test_the_accuracy_sentence_says_the_change_and_what_chance_does():
    said = accuracy_sentence({"suspicious": Accuracy(0.953, None, 150), "cleaned": Accuracy(0.94, None, 150)})
    assert "from 95.3\u00a0% to 94.0\u00a0% (\u22121.3\u00a0points, on 150 images" in said
    halves = [(b - a) / 2 for a, b in (interval(Accuracy(0.953, None, 150)), interval(Accuracy(0.94, None, 150)))]
    assert f"up to about {100 * math.hypot(*halves):.1f}\u00a0points can be chance" in said
    assert points(0.0) == "±0.0\u00a0points"
    assert points(0.012) == "+1.2\u00a0points"
    assert [p_text(p).replace("\u00a0", " ") for p in (0.0001, 0.0123, 1.0)] == ["p < 0.001", "p = 0.012", "p = 1"]
    assert [duration(s) for s in (3.2, 119.6, 7140, 7260)] == ["3 s", "2 min", "119 min", "2 h 1 min"]


def test_of_many_classes_those_that_lost_most_and_stand_out_are_shown(tmp_path):
    count = MOST + 30
    of = {
        name: [
            {"class": k, "value": 0.9 - (0.5 if name == "cleaned" and k == 41 else 0.0), "images": 9}
            for k in range(count)
        ]
        for name in ("suspicious", "cleaned")
    }
    content = {
        "accuracy": {name: accuracy(0.9, per_class=rows) for name, rows in of.items()},
        "scan": {"before": scan(*[0.004 if k == 42 else 0.5 for k in range(count)])},
    }
    text = page(tmp_path, content)
    assert text.count('class="row by-class"') == MOST
    assert '<div class="label name">41</div>' in text
    assert "30 more are in report.json" in text
    assert '<tr><th scope="row">42</th>' in text
    assert text.count('<tr><th scope="row">') == MOST
    assert text.count('<circle class="dot"') == count - 1  # the figure shows all
    assert text.count('class="dot unusual"') == 1


def test_a_list_of_rows_names_its_methods_and_needs_no_statistic(tmp_path):
    rows = [{"class": "cat", "method": "class_shift", "statistic": math.inf, "p_value": 0.01}]
    rows += [{"class": "dog", "method": "class_shift", "statistic": None, "p_value": None}]
    text = page(tmp_path, MINIMAL | {"scan": {"after": {"classes": rows, "verdict": "Cat is."}}})
    assert "<h3>Class shift</h3>" in text
    assert "class cat is reached unusually easily (p\u00a0=\u00a00.01)" in text
    assert text.count('<td class="number">—</td>') == 3
    assert "Cat is." in text


def test_names_of_classes_that_are_other_numbers_are_told_from_numbers():
    names = ["0", "10", "2"]  # as folders are sorted
    entry = Entry({"a": 0, "b": 1, "c": "10", "d": 7, "e": "other"}, "", "")
    labels = [entry.label(key, names) for key in "abcde"]
    assert labels == ["0", "1 (named 10)", "1 (named 10)", "7", "other"]


def opened(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.mark.parametrize("channels", [1, 3])
def test_pseudo_samples_show_the_images_as_they_are_and_the_change_magnified(tmp_path, channels):
    images, _ = write_pictures(tmp_path, channels=channels)
    first = pseudo_samples(tmp_path / "report", NAMES)[0]
    clean, perturbed, change = (opened(picture.uri) for picture in first.pictures)
    expected = images[0].permute(1, 2, 0).squeeze(-1).numpy() if channels == 1 else images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(clean, expected)
    assert np.array_equal(perturbed, expected + 5)
    assert (change == round(127.5 + 127)).all()  # the largest change is drawn white, and all are the largest here
    assert first.pictures[2].caption == "change \u00d725"
    assert first.note == "searched for class truck"
    assert [(one.network, one.label, one.right) for one in first.answers] == [
        ("suspicious", "truck", False),
        ("cleaned", "cat", True),  # class 0 of the names
    ]


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([2, 0, 0], "The suspicious network is wrong on 1 of these 3."),
        ([0, 0, 0], "The suspicious network is right on all of these."),
        ([2, None, 0], None),
    ],
)
def test_the_page_does_not_claim_that_pseudo_samples_mislead_where_they_do_not(tmp_path, answers, sentence):
    write_pictures(tmp_path, count=3)
    samples = [{"class": 0, **({} if said is None else {"suspicious": answer(said)})} for said in answers]
    (tmp_path / "report" / "pseudo.json").write_text(json.dumps({"samples": samples}))
    text = page(tmp_path, whole())
    if sentence is None:
        assert "The suspicious network is" not in text
    else:
        assert sentence in text


def test_accuracy_on_images_of_the_fits_is_said_beside_the_figure(tmp_path):
    figures = {name: accuracy(0.9, 12, held_out=False) for name in ("suspicious", "cleaned")}
    said = "The fits were made on these same images"
    assert said in page(tmp_path, {"accuracy": figures})
    for held_out in ({"held_out": True}, {}):
        figures = {name: accuracy(0.9, 100, **held_out) for name in ("suspicious", "cleaned")}
        assert said not in page(tmp_path, {"accuracy": figures})


def test_attention_is_brightest_where_it_is_largest(tmp_path):
    (tmp_path / "report").mkdir()
    grey = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
    maps = torch.tensor([[[0.0, 0.0], [0.0, 50.0]]])
    save_weights(
        {"images": grey, "suspicious": maps, "cleaned": 0 * maps}, tmp_path / "report" / "attention.safetensors"
    )
    (tmp_path / "report" / "attention.json").write_text('{"samples": [{"class": 0}]}')
    (sample,), layer = attention_samples(tmp_path / "report", NAMES)
    assert layer == ""
    assert [picture.caption for picture in sample.pictures] == ["image", "suspicious", "cleaned"]
    drawn, empty = (opened(picture.uri).astype(int).sum(axis=-1) for picture in sample.pictures[1:])
    assert drawn.shape == (192, 192)
    assert drawn[-1, -1] == drawn.max() > 500
    assert drawn[0, 0] == empty[0, 0] == empty[-1, -1]
    assert drawn[0, -1] == drawn[0, 0]  # only the one corner


def test_no_more_pictures_are_shown_than_fit(tmp_path):
    write_pictures(tmp_path, count=SHOWN + 1)
    assert len(pseudo_samples(tmp_path / "report", NAMES)) == SHOWN
    assert len(attention_samples(tmp_path / "report", NAMES)[0]) == SHOWN


def pixels(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stem", "tensors", "message"),
    [
        ("pseudo", {"images": torch.zeros(2, 3, 8, 8)}, r"Expected `images` to be uint8 .*, but got float32"),
        ("pseudo", {"images": pixels(2, 5, 8, 8)}, r"\(N, 1 or 3, H, W\), but got uint8 of shape"),
        ("pseudo", {"images": pixels(2, 3, 4, 4)}, "Expected `perturbed` to be of the shape of"),
        ("pseudo", {"perturbed": None}, "Expected `pseudo.safetensors` to be one with images and perturbed, but got"),
        ("pseudo", {"images": pixels(3, 3, 8, 8)}, "of as many samples as pseudo.json, but got 3"),
        ("attention", {"cleaned": torch.full((2, 2, 2), math.nan)}, "Expected `cleaned` to be finite attention"),
        ("attention", {"cleaned": torch.full((2, 2, 2), -1.0)}, "Expected `cleaned` to be finite attention of at"),
        ("attention", {"cleaned": torch.zeros(2, 1, 2, 2)}, "Expected `cleaned` to be floating-point attention of"),
    ],
)
def test_broken_pictures_are_named(tmp_path, stem, tensors, message):
    images, maps = write_pictures(tmp_path)
    good = {"images": images, **({"perturbed": images} if stem == "pseudo" else {"suspicious": maps, "cleaned": maps})}
    changed = {name: value for name, value in (good | tensors).items() if value is not None}
    save_weights(changed, tmp_path / "report" / f"{stem}.safetensors")
    with pytest.raises(ValueError, match=message):
        page(tmp_path, whole())


def test_large_pictures_become_small_files(tmp_path):
    (tmp_path / "report").mkdir()
    images = torch.randint(0, 256, (1, 3, 700, 500), dtype=torch.uint8)
    save_weights({"images": images, "perturbed": images}, tmp_path / "report" / "pseudo.safetensors")
    (tmp_path / "report" / "pseudo.json").write_text('{"samples": [{"class": 0}]}')
    for picture in pseudo_samples(tmp_path / "report", NAMES)[0].pictures:
        assert picture.uri.startswith("data:image/jpeg")
        assert opened(picture.uri).shape[:2] == (192, 137)


def test_the_loading_lines_run(tmp_path, monkeypatch):
    lines = loading_lines("cleaned.safetensors", "nba_lightning.networks.SmallCNN", {"in_channels": 1, "width": 4})
    from nba_lightning.networks import SmallCNN

    theirs = SmallCNN(in_channels=1, width=4)
    save_weights(theirs.state_dict(), tmp_path / "cleaned.safetensors")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec("\n".join(lines), scope)
    assert torch.equal(scope["network"].fc.weight, theirs.fc.weight)
    assert loading_lines("a", "os; evil()", None) == loading_lines("a", None, None)
    assert len(loading_lines("a", None, None)) == 3
