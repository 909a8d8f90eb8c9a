"""The report: what ``clean`` left in a folder, as one page that opens anywhere.

:func:`write_report` reads ``DIR/report.json`` and, where they exist, pictures in ``DIR/report/``, and writes
``DIR/report.html``. What is optional may be missing, then its part of the page is left out; unknown keys are ignored.

``report.json``, all shares and probabilities in [0, 1]::

    accuracy     suspicious, cleaned, and optional teacher: each {value, standard_error, images} and optional
                 held_out (bool: none of these images was in a fit) and
                 per_class, a list of {class, value, images, optional standard_error}
    scan         optional before and after: each {classes, optional verdict, optional level (0.05)}; classes is
                 {method: [{class, statistic, p_value}, ...]}, or one list whose rows name their method too;
                 verdict is a sentence, or {method: sentence}; p-values are adjusted for the number of classes
    chosen       optional {optimiser, rate, steps, batch, layers, ...}, any plain values, and
                 reasons: {one of these names: why, as a sentence}
    weights      optional {file, handed_over (bool), optional: reason and next (sentences, of a rejected network),
                 network (class path), arguments (its keyword arguments), mean, std, size (what the network expects)}
    warnings     optional list of sentences
    curves       optional list of {fit (its name), epoch, ...}; names with "acc" in them are shares, names with "loss"
                 in them are losses, others are ignored
    classes      optional names in the network's order; where a ``class`` is a number, it counts in them
    versions, provenance   optional {name: plain value}
    seconds, seed          optional numbers

``report/pseudo.safetensors``, the strongest first: ``images`` and ``perturbed``, `(N, C, H, W)` uint8, C = 1 or 3; and
``report/pseudo.json``::

    {samples: N of {class, suspicious, cleaned, optional teacher, target, source}}

where ``class`` is the true one, ``target`` the one it was searched for, ``source`` how it was found (``universal``),
and each network's answer to the perturbed image is {class, optional probability}.

``report/attention.safetensors``: ``images`` `(N, C, H, W)` uint8, and ``suspicious``, ``cleaned``, optional
``teacher``, `(N, h, w)` float, at least 0, of any scale (each map is drawn relative to its own largest value); and
``report/attention.json``, of the same form as ``pseudo.json``, with an optional ``layer`` beside ``samples``, and an
optional ``caption`` in each sample ("clean", "pseudo sample").
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nba_lightning import __version__
from nba_lightning.app import report_figures as figures
from nba_lightning.app import report_sentences as sentences
from nba_lightning.app.report_classes import by_class, by_method
from nba_lightning.app.report_loading import read_weights
from nba_lightning.app.report_pictures import Sample, attention_samples, pseudo_samples
from nba_lightning.app.report_reading import NETWORKS, Entry, plain, read_accuracy, read_json, read_scan
from nba_lightning.io.files import whole


def report(folder: Path) -> None:
    """Write ``report.html`` anew from what ``clean`` left.

    Args:
        folder: the output folder of ``clean``, with report.json.
    """
    print(f"Wrote {write_report(folder)}")


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the files that this module's docstring names.

    Args:
        folder: the output folder of ``clean``, with ``report.json``.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: if there is no ``report.json``.
        ValueError: if an entry or a picture file is broken or missing, naming it.
    """
    folder = Path(folder)
    page = _environment().get_template("report.html").render(_context(folder))
    path = folder / "report.html"
    with whole(path) as unfinished:
        unfinished.write_bytes(page.encode("utf-8", "replace"))  # names of folders need not be valid text
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nba_lightning.app"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=sentences.percent,
        points=sentences.points,
        p=sentences.p_text,
        title_of=sentences.method_title,
        plain=plain,
        duration=sentences.duration,
    )
    return environment


def _context(folder: Path) -> dict[str, Any]:
    """All that the templates show."""
    root = read_json(folder / "report.json", "report.json")
    names = root.texts("classes")
    accuracy, weights = read_accuracy(root, names), read_weights(root, folder)
    scan = root.child("scan") or Entry({}, "scan", root.file)
    before, after = (
        read_scan(entry, names) if (entry := scan.child(part)) is not None else None for part in ("before", "after")
    )
    pseudo = pseudo_samples(folder / "report", names)
    attention, layer = attention_samples(folder / "report", names)
    scans = [one for one in (before, after) if one is not None]
    return {
        "version": __version__,
        "weights": weights,
        "verdict": [sentences.scan_sentence(before, after), sentences.accuracy_sentence(accuracy)],
        "warnings": root.texts("warnings"),
        "called": {name: name for name in NETWORKS} | ({"cleaned": "rejected"} if weights.handed_over is False else {}),
        "accuracy": accuracy,
        "intervals": any(figures.interval(one) for one in accuracy.values()),
        "networks": figures.spans({name: {name: one} for name, one in accuracy.items()}),
        "classes": by_class(accuracy),
        "methods": by_method(before, after),
        "scans": {"before": before, "after": after},
        "pseudo": pseudo,
        "wrong": _wrong(pseudo),
        "attention": attention,
        "layer": layer,
        "curves": figures.curves(root.children("curves")),
        "chosen": _chosen(root.child("chosen")),
        "not_shown": sentences.not_shown(accuracy, scans, bool(pseudo or attention)),
        "provenance": _provenance(root),
    }


def _chosen(entry: Entry | None) -> list[tuple[str, str, str]]:
    """Name, value and reason of all that was chosen."""
    if entry is None:
        return []
    reasons = entry.child("reasons") or Entry({}, "reasons", entry.file)
    return [
        (name.replace("_", " "), plain(value), reasons.text(name) or "")
        for name, value in entry.values.items()
        if name != "reasons"
    ]


def _wrong(samples: list[Sample]) -> int | None:
    """On how many pseudo samples the suspicious network is wrong; ``None`` where it was not asked about all."""
    said = [not answer.right for one in samples for answer in one.answers if answer.network == "suspicious"]
    return sum(said) if len(said) == len(samples) else None


def _provenance(root: Entry) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), plain(value)) for name, value in _values(root, "provenance")]
    if (seconds := root.number("seconds", 0)) is not None:
        rows.append(("time", sentences.duration(seconds)))
    if root.values.get("seed") is not None:
        rows.append(("seed", plain(root.values["seed"])))
    return rows + [(name, plain(value)) for name, value in _values(root, "versions")]


def _values(root: Entry, key: str) -> list[tuple[str, Any]]:
    child = root.child(key)
    return [] if child is None else list(child.values.items())
