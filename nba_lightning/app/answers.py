"""What a network says to clean images, and whether the order of its classes is that of the folder."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nba_lightning.callbacks.guard import Answers
from nba_lightning.core.checks import first_few
from nba_lightning.core.features import predict
from nba_lightning.core.modes import evaluating
from nba_lightning.data.owner import CleanImages


@torch.no_grad()
def ask(network: nn.Module, data: CleanImages, held_out: bool, device: torch.device, bar: bool = False) -> Answers:
    """The classes that a network gives to all images, or to those held out; the same on each process."""
    data.trainer = None  # one that a fit left would divide the images among its processes
    loader = data.held_out_dataloader() if held_out else data.predict_dataloader()
    assert loader is not None
    weight = next(network.to(device).parameters())
    parts: list[tuple[Tensor, Tensor]] = []
    with evaluating(network):
        for given in track(loader, "Asking the network", transient=True, disable=not bar):
            batch = given.to(device)
            images = (batch.images.float() / 255).to(weight.dtype)
            parts.append((batch.labels, predict(network, images).argmax(dim=1)))
    labels, predicted = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Answers(labels, predicted)


def accuracy_entry(answers: Answers, names: Sequence[str], held_out: bool) -> dict[str, Any]:
    """An accuracy as the report has it: value, standard error, images, and those of each class."""
    per_class = []
    for label, name in enumerate(names):
        of_class = answers.labels == label
        if bool(of_class.any()):
            part = Answers(answers.labels[of_class], answers.predicted[of_class])
            per_class.append({"class": name, **vars(part.accuracy())})
    return {**vars(answers.accuracy()), "held_out": held_out, "per_class": per_class}


def check_order(answers: Answers, names: Sequence[str], num_classes: int) -> str | None:
    """Make sure that the network knows its classes by the numbers that the folder gives them.

    Args:
        answers: of the suspicious network to all clean images.
        names: of all K classes, in the assumed order.
        num_classes: K of the network.

    Returns:
        A warning where another order fits clearly better, ``None`` else.

    Raises:
        ValueError: if the network is right on fewer than half of the images, with the confusion and a likely order.
    """
    table = torch.zeros((num_classes, num_classes), dtype=torch.long)
    table.index_put_((answers.labels, answers.predicted), torch.tensor(1), accumulate=True)
    total, right = int(table.sum()), int(table.diag().sum())
    best, order = _best_order(table)
    listed = "[" + ",".join(names[row] for row in order) + "]"
    other = f"With `--classes {listed}` it would be right on {best}"
    if 2 * right < total:
        advice = (
            f"{other}: is that its order?"
            if 2 * best >= total
            else f"No order of classes makes it right on more than {best}, so look at its `mean` and `std`, the image "
            "size, its weights, and whether these images are of its kind (`trust_classes` goes on all the same)."
        )
        raise ValueError(
            f"Expected the network to be right on at least half of its clean images, but it is on {right} of {total}. "
            f"{_confusion(table, names)} {advice}"
        )
    if best - right > max(2, 0.05 * total):
        return f"The network is right on {right} of {total} clean images. {other}: are two classes exchanged?"
    return None


def _best_order(table: Tensor) -> tuple[int, list[int]]:
    """The most images that any order makes right, and for each number of the network the row of the table."""
    # A touch for the order that is there, so that classes without images stay where they are.
    gain = table.double() + 0.01 * torch.eye(len(table), dtype=torch.double)
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    order = [0] * len(table)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        order[column] = row
    return int(table[rows, columns].sum()), order


def _confusion(table: Tensor, names: Sequence[str]) -> str:
    """What the network says to each class, the largest confusions first."""
    wrong = table.clone().fill_diagonal_(0)
    rows = sorted(range(len(table)), key=lambda row: -int(wrong[row].max()))
    said = []
    for row in rows:
        if int(wrong[row].max()):
            column = int(wrong[row].argmax())
            of = f"{int(wrong[row, column])} of {int(table[row].sum())}"
            said.append(f"{of} images of {names[row]!r} as class {column} ({names[column]!r})")
    return f"It sees {first_few(said)}."
