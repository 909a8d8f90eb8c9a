"""Perturbations of features, in place of images: what any trigger has to come to inside of the network."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nba_lightning.core.checks import check_at_least, check_range, expected
from nba_lightning.core.features import changed, features, predict
from nba_lightning.core.functional import GRADIENT_SCALE
from nba_lightning.core.layers import resolve_layers
from nba_lightning.core.modes import evaluating
from nba_lightning.pseudo.base import Reduce, descended, noise_for, root_mean_square, same, too_early

_LAYERS = 2
"""Of a network's default layers the first ones are perturbed: behind them there is enough left that can unlearn."""


class LatentPerturbations(nn.Module):
    r"""Universal perturbations of a network's features, one for each class and layer, that lead to the class.

    A trigger of no known kind still has to reach its target through the network's features. So for each class k and
    layer l a perturbation :math:`d_{kl}` of the shape of the features of one image is crafted, by gradient steps from
    noise, that minimises over clean images x

    .. math:: CE(S(x;\, f_l + d_{kl}), k), \quad rms(d_{kl}) \le size \cdot rms(f_l^0)

    where :math:`f_l^0` are the features of the network as it came. (Were they those of the network as it is, both would
    grow in turn.)

    Images whose features carry one keep their labels in training
    (:class:`~nba_lightning.defenses.FineTuning`), so that the way to the class is unlearned.

    Source: latent adversarial training (Casper et al., "Defending Against Unforeseen Failure Modes with Latent
    Adversarial Training", TMLR 2025, arXiv 2403.05030), which perturbs one layer for each image on its own and towards
    no class; perturbations that serve all images, for a class each, are ours.

    Args:
        layers: module paths of the layers; ``None`` takes the first two of
            :func:`nba_lightning.core.layers.default_layers`.
        size: bound on a perturbation's root mean square, in units of that of the layer's features at the first
            regeneration (after a :meth:`reset`).
        steps: gradient steps at each regeneration, one batch each.
        images_each: clean images for each perturbation in a step.
        classes: how many classes are taken at each regeneration, at random, of a network that has more.

    Raises:
        ValueError: for an argument out of its range; by :meth:`regenerate` for an unknown layer, or a network that has
            no default ones.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        size: float = 0.3,
        steps: int = 8,
        images_each: int = 6,
        classes: int = 10,
    ) -> None:
        super().__init__()
        check_range("size", size, 0.0, float("inf"), open_low=True)
        for name, number in {"steps": steps, "images_each": images_each, "classes": classes}.items():
            check_at_least(name, number, 1)
        if layers is not None and not layers:
            raise expected("layers", "at least one layer, or None for the network's own", layers)
        self.layers, self.size, self.steps = layers, size, steps
        self.images_each, self.classes = images_each, classes
        self.banks: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    def layers_of(self, network: nn.Module) -> list[str]:
        """Module paths of the layers whose features are perturbed.

        Raises:
            ValueError: for an unknown layer, or a network that has no default ones.
        """
        found = resolve_layers(network, self.layers)
        return found if self.layers is not None else found[:_LAYERS]

    def reset(self) -> None:
        """Forget what was crafted, and for which network."""
        self.banks, self.scales = {}, {}

    def regenerate(
        self,
        network: nn.Module,
        batches: Iterator[Tensor],
        generator: torch.Generator | None = None,
        reduce: Reduce = same,
    ) -> None:
        """Craft perturbations for the network as it is now; it is in ``eval`` mode meanwhile.

        Args:
            network: the network.
            batches: endless clean images `(B, C, H, W)` in [0, 1].
            generator: source of randomness, the same on all processes, on the images' device.
            reduce: averages a tensor over all processes; one process needs none.
        """
        images = next(batches)
        with evaluating(network), torch.no_grad():
            logits, seen = features(network, images, self.layers_of(network))
            number = logits.shape[1]
            order = torch.randperm(number, generator=generator, device=images.device)
            classes = order[: self.classes].sort().values
            for name, found in seen.items():
                if name not in self.scales:
                    self.scales[name] = reduce(found.float().square().mean()).sqrt()
                self.banks[name] = self._crafted(network, name, found, classes, batches, generator, reduce)

    def passes(self, batch: int, num_classes: int) -> int:
        """How often images go through a network, forwards or backwards, in one regeneration.

        Args:
            batch: images of a batch.
            num_classes: of the network.
        """
        layers = _LAYERS if self.layers is None else len(self.layers)
        return batch + 2 * layers * self.steps * self.images_each * min(self.classes, num_classes)

    def within(
        self, network: nn.Module, share: float, turn: int, generator: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """A ``with`` block in which the last ``share`` of each batch is perturbed, each image for a class at random.

        Args:
            network: the network.
            share: of the images of a batch, in [0, 1]; loaders shuffle.
            turn: number of the batch; layers take turns.
            generator: source of randomness, on the images' device.

        Raises:
            RuntimeError: if nothing was crafted yet.
        """
        if not self.banks:
            raise too_early("training")
        layer = list(self.banks)[turn % len(self.banks)]
        bank = self.banks[layer]

        def change(found: Tensor) -> Tensor:
            number = round(share * len(found))
            rows = torch.randint(len(bank), (number,), generator=generator, device=found.device)
            first, last = found[: len(found) - number], found[len(found) - number :]
            return torch.cat([first, last + bank.to(found)[rows]])

        return changed(network, layer, change)

    def _crafted(
        self,
        network: nn.Module,
        layer: str,
        found: Tensor,
        classes: Tensor,
        batches: Iterator[Tensor],
        generator: torch.Generator | None,
        reduce: Reduce,
    ) -> Tensor:
        """Perturbations `(K, ...)` of a layer with features ``found`` `(B, ...)`, one for each class."""
        bound = self.size * self.scales[layer].to(found.device)
        noise = noise_for(found, len(classes), generator)
        bank = 0.1 * bound * noise / root_mean_square(noise)
        owner = torch.arange(len(classes), device=found.device).repeat_interleave(self.images_each)
        for _ in range(self.steps):
            images = next(batches)
            chosen = torch.randint(len(images), owner.shape, generator=generator, device=images.device)
            gradients = reduce(self._gradients(network, layer, images[chosen], bank, owner, classes[owner]))
            bank = descended(bank, gradients, bound, self.steps)
        return bank

    def _gradients(
        self, network: nn.Module, layer: str, images: Tensor, bank: Tensor, owner: Tensor, wanted: Tensor
    ) -> Tensor:
        """Of the cross-entropy with the classes ``wanted`` `(B,)`, for the perturbations `(K, ...)`."""
        with torch.enable_grad():
            leaf = bank.detach().requires_grad_()
            with changed(network, layer, lambda found: found + leaf[owner].to(found.dtype)):
                logits = predict(network, images)
            loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
            return torch.autograd.grad(GRADIENT_SCALE * loss, leaf)[0].float()

    def get_extra_state(self) -> dict[str, dict[str, Tensor]]:
        """Perturbations `(K, ...)` and scales by layer, for checkpoints; no shape is known before they are crafted."""
        return {"banks": self.banks, "scales": self.scales}

    def set_extra_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take them over."""
        self.banks, self.scales = dict(state["banks"]), dict(state["scales"])
