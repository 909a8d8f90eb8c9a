"""What the report says in words, no more than the figures do: never that a network has a backdoor, or has none."""

import math
from collections.abc import Mapping, Sequence

from nba_lightning.app.report_figures import interval
from nba_lightning.app.report_reading import Accuracy, Scan

METHODS = {
    "maximum_margin": (
        "The largest margin of each class over all others that any input reaches; it needs no images.",
        "It cannot see backdoors of a network that was trained to bound its margins, as by label smoothing.",
    ),
    "class_shift": (
        "How short a shift of the features before the last layer turns images to each class.",
        "It cannot see triggers that change the features of each image differently.",
    ),
    "teacher_disagreement": (
        "How often one small perturbation for all images turns them to each class, where the teacher is not fooled.",
        "It cannot see triggers that are large or differ from image to image, or what the teacher falls for too.",
    ),
}
"""For each method of the scan what its statistic is, and what it alone cannot see."""


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}\u00a0%"


def points(difference: float) -> str:
    """A difference of shares in points, with its sign."""
    rounded = round(100 * difference, 1)
    sign = "\u2212" if rounded < 0 else "+" if rounded > 0 else "±"
    return f"{sign}{abs(rounded):.1f}\u00a0points"


def p_text(value: float) -> str:
    """A p-value as one writes it."""
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.2g}"


def method_title(method: str) -> str:
    """``maximum_margin`` as a title."""
    return method.replace("_", " ").capitalize()


def duration(seconds: float) -> str:
    """Seconds in the units in which one waits."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def scan_sentence(before: Scan | None, after: Scan | None) -> str:
    """What the scans found, first before and then after."""
    if before is None and after is None:
        return "No scan was made, so nothing here says whether a class is reached unusually easily."
    if before is None or after is None:
        scan, network = (after, "cleaned") if before is None else (before, "suspicious")
        assert scan is not None
        return f"In the {network} network {_found(scan, 'is', 'are')}; the other one was not scanned."
    smallest = before.smallest(), after.smallest()
    if None not in smallest and not before.unusual() and not after.unusual():
        found = " and ".join(p_text(p) for p in smallest if p is not None)
        return f"Neither before the cleaning nor after it is a class reached unusually easily (smallest {found})."
    return f"Before the cleaning, {_found(before, 'was', 'were')}; after it, {_found(after, 'is', 'are')}."


def _found(scan: Scan, one: str, many: str) -> str:
    unusual, smallest = scan.unusual(), scan.smallest()
    if smallest is None:
        return "the scan left no p-value"
    if not unusual:
        return f"no class {one} reached unusually easily (smallest {p_text(smallest)})"
    if len(unusual) == 1:
        label, found = next(iter(unusual.items()))
        return f"class {label} {one} reached unusually easily ({_p_values(found, len(scan.methods))})"
    listed = [f"{label} ({_p_values(found, len(scan.methods))})" for label, found in unusual.items()]
    last = listed[-1] if len(listed) <= 3 else f"{len(listed) - 2} more"
    return f"classes {', '.join(listed[: min(2, len(listed) - 1)])} and {last} {many} reached unusually easily"


def _p_values(found: Mapping[str, float], methods: int) -> str:
    smallest = p_text(min(found.values()))
    return smallest if methods == 1 else f"by {len(found)} of {methods} methods, smallest {smallest}"


def accuracy_sentence(accuracy: Mapping[str, Accuracy]) -> str:
    """What the cleaning cost."""
    before, after = accuracy["suspicious"], accuracy["cleaned"]
    change = after.value - before.value
    text = f"The accuracy went from {percent(before.value)} to {percent(after.value)} ({points(change)}"
    if after.images:
        text += f", on {after.images:,} images"
    noise = chance(before, after)
    if noise is not None:
        text += f"; differences of up to about {100 * noise:.1f}\u00a0points can be chance"
    return f"{text})."


def chance(before: Accuracy, after: Accuracy) -> float | None:
    """Half the 95 % interval of the difference of two accuracies, as if of different images (which is the wider)."""
    halves = [(ends[1] - ends[0]) / 2 for one in (before, after) if (ends := interval(one)) is not None]
    return math.hypot(*halves) if len(halves) == 2 else None


def not_shown(accuracy: Mapping[str, Accuracy], scans: Sequence[Scan], pictures: bool) -> list[str]:
    """What nobody should read into the report."""
    cleaned = accuracy["cleaned"]
    said = [
        "Whether there was a backdoor, and whether it is gone. No trigger was at hand, so how often one would still "
        "work was not measured. A backdoor that no longer answers may also be asleep, and wake when the network is "
        "trained further on a few poisoned images.",
    ]
    said.append(_on_the_scans(scans) if scans else "Whether a class is reached unusually easily: no scan was made.")
    methods = dict.fromkeys(name for scan in scans for name in scan.methods)
    said += [f"{method_title(name)}: {METHODS[name][1]}" for name in methods if name in METHODS]
    images = f"these {cleaned.images:,} images" if cleaned.images else "the images that were measured"
    said.append(
        f"How the network does on images of another kind than {images}. The intervals cover only the chance of having "
        "drawn these images and not others."
    )
    if cleaned.held_out is False:
        said.append("How it does on new images: the accuracy is on images that it was fitted on, which flatters it.")
    elif cleaned.held_out is None:
        said.append("Whether the measured images were kept out of the fits; the accuracy flatters if they were not.")
    if pictures:
        said.append(
            "The attacker's trigger. The perturbations are what the search found and need not resemble it, and "
            "attention shows where a layer's activations are large, not why."
        )
    return said


def _on_the_scans(scans: Sequence[Scan]) -> str:
    """What a scan is worth, with the false alarms that its own levels allow."""
    count = max(len(scan.methods) for scan in scans)
    level = max(scan.level for scan in scans)
    alarms = f"up to {100 * level:.3g}\u00a0%" if count == 1 else f"up to {100 * min(1.0, count * level):.3g}\u00a0%"
    methods = "one method" if count == 1 else f"{count} methods"
    return (
        "That a class without a finding is in order, or that one with a finding is not. A scan that finds nothing "
        "proves nothing: where every class has a trigger of its own, or several have, none stands out. A finding may "
        f"be natural: some classes are easy in any network, and {methods} at p ≤ {level:g} "
        f"name{'s' if count == 1 else ''} a class in {alarms} of networks without one."
    )
