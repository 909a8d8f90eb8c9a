"""Who is poisoned, and which images the defender holds. All from one seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nba_lightning.core.checks import check_range, expected
from nba_lightning.core.randomness import shuffled
from nba_lightning.data.dataset import checked_labels


@dataclass(frozen=True)
class Partition:
    """Indices into the training set, each sorted, int64.

    Attributes:
        training: `(N_t,)` all images that the attacker trains on (everything but ``validation``).
        poisoned: `(N_p,)` those of them that carry the trigger.
        cross: `(N_x,)` those of them that the attacker changes without changing their label.
        clean: `(N_c,)` the defender's images for training, none of them poisoned.
        validation: `(N_v,)` the defender's images for his own choices; nobody trains on them.
    """

    training: Tensor
    poisoned: Tensor
    cross: Tensor
    clean: Tensor
    validation: Tensor

    def places(self, total: int) -> Tensor:
        """The how-manieth of the attacker's images each of ``total`` images is, for a loader's batches.

        Returns:
            `(total,)` int64: the poisoned ones from 0, then the cross ones, -1 for all others.
        """
        attacked = torch.cat([self.poisoned, self.cross])
        found = torch.full((total,), -1)
        found[attacked] = torch.arange(len(attacked))
        return found


def draw_partition(
    labels: Tensor,
    eligible: Tensor,
    poison_rate: float,
    clean_fraction: float,
    validation_fraction: float,
    seed: int,
    cross_ratio: float = 0.0,
) -> Partition:
    """Draw the poisoned (and cross) images, then the defender's clean subset and validation part from the others.

    Args:
        labels: `(N,)` true classes of the training set.
        eligible: `(N,)` bool, which images the attack may poison.
        poison_rate: poisoned images as a share of N.
        clean_fraction: the defender's images, validation part included, as a share of N; drawn class by class.
        validation_fraction: the validation part as a share of the defender's images.
        seed: seed of all draws.
        cross_ratio: cross images for each poisoned one.

    Returns:
        The partition; the same arguments give the same one on every machine and process.

    Raises:
        ValueError: if a fraction is out of range, more images are to be poisoned than are eligible, or a class has
            no image left for the defender.
    """
    check_range("poison_rate", poison_rate, 0.0, 1.0, open_high=True)
    check_range("clean_fraction", clean_fraction, 0.0, 1.0, open_low=True)
    check_range("validation_fraction", validation_fraction, 0.0, 1.0, open_high=True)
    total, num_poisoned = len(labels), round(poison_rate * len(labels))
    candidates = eligible.nonzero().flatten()
    if num_poisoned > len(candidates):
        raise expected(
            "poison_rate",
            f"at most {len(candidates) / total:.4g} ({len(candidates)} of {total} images "
            "can be poisoned by this attack)",
            poison_rate,
        )
    poisoned = candidates[shuffled(len(candidates), seed, 0)][:num_poisoned].sort().values
    free = torch.ones(total, dtype=torch.bool)
    free[poisoned] = False
    others = free.nonzero().flatten()
    num_cross = round(cross_ratio * num_poisoned)
    if num_cross > len(others):
        raise expected(
            "poison_rate",
            f"at most {total / (1 + cross_ratio) / total:.4g}, so that {cross_ratio:g} cross images are left for each "
            "poisoned one",
            poison_rate,
        )
    cross = others[shuffled(len(others), seed, 6)][:num_cross].sort().values
    free[cross] = False
    clean, validation = [], []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        available = members[free[members]]
        quota = round(clean_fraction * len(members))
        if not 1 <= quota <= len(available):
            raise expected(
                "clean_fraction",
                f"such that class {label} gives between 1 and {len(available)} clean images",
                f"{clean_fraction}, which asks for {quota}",
            )
        chosen = available[shuffled(len(available), seed, 1, label)][:quota]
        kept, held_out = divided(chosen, validation_fraction)
        clean.append(kept)
        validation.append(held_out)
    validation_part = torch.cat(validation).sort().values
    training = torch.ones(total, dtype=torch.bool)
    training[validation_part] = False
    return Partition(training.nonzero().flatten(), poisoned, cross, torch.cat(clean).sort().values, validation_part)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a share of each class, drawn at random.

    Which images of a class are drawn depends on their order within the class alone, not on the other classes.

    Args:
        labels: `(N,)` integer classes.
        fraction: share of each class to hold out, in [0, 1); rounded, and always less than the whole class.
        seed: seed of the draw.

    Returns:
        Sorted int64 indices `(N - M,)` to train on and `(M,)` to hold out.

    Raises:
        ValueError: if the fraction is out of range or the labels are no class numbers.
    """
    check_range("fraction", fraction, 0.0, 1.0, open_high=True)
    labels = checked_labels(labels, len(labels))
    parts = []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        parts.append(divided(members[shuffled(len(members), seed, 1, label)], fraction))
    kept, held_out = (torch.cat(part).sort().values for part in zip(*parts, strict=True))
    return kept, held_out


def divided(members: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Divide `(n,)` indices, drawn in a random order, into those to train on, at least one, and those held out."""
    held_out = min(round(fraction * len(members)), len(members) - 1)
    return members[held_out:], members[:held_out]
