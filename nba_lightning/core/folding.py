"""Folding an affine map of a layer's input channels into the layer's own weights, so that a network keeps its keys."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from nba_lightning.core.checks import expected, first_few
from nba_lightning.core.features import changed, logits_of
from nba_lightning.core.functional import in_float32


@dataclass(frozen=True)
class Seam:
    """A layer whose weight takes up a matrix in front of it, and the layer whose bias takes up a shift.

    Attributes:
        layer: module path of a convolution or linear layer.
        norm: module path of the BatchNorm behind it, which takes up the shift; ``None`` if the layer's own bias does.
    """

    layer: str
    norm: str | None = None

    @property
    def weight(self) -> str:
        """The name of the weight that takes up the matrix."""
        return f"{self.layer}.weight"

    @property
    def bias(self) -> str:
        """The name of the bias that takes up the shift."""
        return f"{self.norm or self.layer}.bias"

    def shifted(self, model: nn.Module, bias: Tensor, constant: Tensor) -> Tensor:
        """The bias `(O,)` that does what a constant `(O,)` on the layer's output would; in ``eval`` mode."""
        if self.norm is not None:
            norm = model.get_submodule(self.norm)
            assert isinstance(norm, _BatchNorm)
            assert norm.running_var is not None
            constant = constant * norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        return (bias + constant).to(bias.dtype)

    @torch.no_grad()
    def check(self, model: nn.Module, images: Tensor) -> None:
        """Raise if something else than the BatchNorm sees the layer's output, which a shift would reach too.

        Args:
            model: the network, in ``eval`` mode.
            images: `(B, C, H, W)` in [0, 1].
        """
        bias, layer = model.get_parameter(self.bias), model.get_submodule(self.layer)
        constant = torch.linspace(-1.0, 1.0, len(bias), device=bias.device)
        folded = {self.bias: self.shifted(model, bias, constant)}
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        plain = logits_of(model(images))
        wanted = logits_of(functional_call(model, folded, (images,)))
        with changed(model, self.layer, lambda output: output + constant.view(shape).to(output.dtype)):
            found = logits_of(model(images))
        if not (found - wanted).float().norm() <= 0.1 * (found - plain).float().norm() + 1e-5:
            others = first_few([name for name in seams(model) if name != self.layer], 40)
            raise expected("layer", f"one whose output only {self.norm!r} sees, such as {others}", repr(self.layer))


def seams(model: nn.Module) -> dict[str, Seam]:
    """The layers of a network that take up a matrix and a shift, by module path.

    They are convolutions without groups and linear layers that have a bias, or a BatchNorm with weights that their
    parent names right behind them; whether it is also called there, :meth:`Seam.check` can tell.
    """
    found: dict[str, Seam] = {}
    for path, parent in model.named_modules():
        prefix = f"{path}." if path else ""
        for (name, layer), (next_name, follower) in pairwise([*parent.named_children(), ("", None)]):
            if not (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)):
                continue
            if layer.bias is not None:
                found[prefix + name] = Seam(prefix + name)
            elif isinstance(follower, _BatchNorm) and follower.affine and follower.track_running_stats:
                found[prefix + name] = Seam(prefix + name, prefix + next_name)
    return {name: found[name] for name, _ in model.named_modules() if name in found}  # in the network's order


def resolve_seam(model: nn.Module, layer: str | None) -> Seam:
    """A layer that was named, or the last convolution that will do.

    Raises:
        ValueError: if nothing can be folded into it, or there is no convolution but the first, which sees the image
            itself (in a transformer it is the only one); the message lists the layers that will do.
    """
    known = seams(model)
    listed = first_few(known, 40) or f"of which {type(model).__name__} has none"
    if layer is None:
        convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        fitting = [name for name in known if name in convolutions[1:]]
        if not fitting:
            raise expected("layer", f"named for {type(model).__name__}, as one of {listed}", None)
        return known[fitting[-1]]
    if layer not in known:
        kind = "a convolution without groups or a linear layer, with a bias or with BatchNorm behind it"
        raise expected("layer", f"{kind}, since nothing can be folded into others: {listed}", repr(layer))
    return known[layer]


@in_float32
def folded_weight(weight: Tensor, matrix: Tensor) -> Tensor:
    """The weight `(O, C, ...)` of a layer that does as one with ``weight`` behind a ``matrix`` `(C, C)` of channels."""
    return torch.einsum("oi...,ij->oj...", weight.float(), matrix.float()).to(weight.dtype)


@in_float32
def folded_shift(weight: Tensor, shift: Tensor) -> Tensor:
    """What a shift `(C,)` of all inputs, those of the padding too, adds to each output `(O,)` of a layer."""
    return weight.float().reshape(*weight.shape[:2], -1).sum(dim=2) @ shift.float()
