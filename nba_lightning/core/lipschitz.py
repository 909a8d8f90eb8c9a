"""How much each channel of a network can stretch what comes in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def normalized_convolutions(network: nn.Module) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Each BatchNorm with weights, and the last convolution before it, in the order in which modules were registered.

    Those whose numbers of channels differ are left out.
    """
    found, convolution = list[tuple[nn.Conv2d, _BatchNorm]](), None
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
        if not isinstance(module, _BatchNorm) or not module.affine or module.running_var is None:
            continue
        if convolution is not None and convolution.out_channels == module.num_features:
            found.append((convolution, module))
    return found


@torch.no_grad()
def channel_lipschitz(convolution: nn.Conv2d, norm: _BatchNorm) -> Tensor:
    r"""Upper bounds :math:`\| W_c \|_2\, |\gamma_c| / \sigma_c` of the channels' Lipschitz constants, `(C,)` float32.

    :math:`W_c` are the weights of a channel as a matrix `(C_in, K)` of K positions, whose largest singular value
    counts.

    Source: Zheng et al., "Data-free backdoor removal based on channel Lipschitzness", ECCV 2022 (arXiv 2208.03111),
    section 3.
    """
    assert norm.running_var is not None
    scale = norm.weight.float().abs() / (norm.running_var.float() + norm.eps).sqrt()
    matrices = convolution.weight.float().flatten(2) * scale[:, None, None]
    bounds: Tensor = torch.linalg.matrix_norm(matrices, ord=2)
    return bounds


@torch.no_grad()
def level_channels(network: nn.Module, u: float, reduce: Callable[[Tensor], Tensor] = lambda bounds: bounds) -> None:
    """Give channels whose bound lies u standard deviations above the layer's mean the layer's mean weight and bias.

    Args:
        network: any network; its BatchNorm layers are changed in place.
        u: standard deviations.
        reduce: mean of the bounds over processes, whose BatchNorm statistics may differ.
    """
    for convolution, norm in normalized_convolutions(network):
        bounds = reduce(channel_lipschitz(convolution, norm))
        outliers = bounds > bounds.mean() + u * bounds.std()
        for parameter in (norm.weight, norm.bias):
            parameter.copy_(torch.where(outliers, parameter.mean(), parameter))
