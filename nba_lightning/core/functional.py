"""Pure maths: knowledge forms, divergences and the defence effectiveness rating. No state, no randomness.

Everything that squares or normalises is computed in float32, so half-precision features neither overflow nor underflow;
also under autocast.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

_Arguments = ParamSpec("_Arguments")

GRADIENT_SCALE = 1024.0
"""Where a gradient is only used for its direction, this factor keeps it from vanishing in half precision."""


def in_float32(form: Callable[_Arguments, Tensor]) -> Callable[_Arguments, Tensor]:
    """Run a function without autocast, which would cast its matrix products to half precision again."""

    @functools.wraps(form)
    def whole(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not torch.amp.is_autocast_available(first.device.type):
            return form(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return form(*args, **kwargs)

    return whole


def as_tokens(features: Tensor) -> Tensor:
    """Bring features into token form.

    Args:
        features: `(B, C, H, W)` feature maps, `(B, T, D)` tokens or `(B, D)` vectors.

    Returns:
        `(B, T, D)` float32, one token per position.
    """
    if features.ndim == 4:
        return features.float().flatten(2).transpose(1, 2)
    if features.ndim == 3:
        return features.float()
    if features.ndim == 2:
        return features.float().unsqueeze(1)
    raise ValueError(
        "Expected `features` to have shape (B, C, H, W), (B, T, D) or (B, D), but got "
        f"a tensor of shape {tuple(features.shape)}."
    )


def unit(vectors: Tensor) -> Tensor:
    """Scale everything behind the batch axis to Euclidean length 1 and flatten it to `(B, N)`."""
    return F.normalize(vectors.float().flatten(1), dim=1)


@in_float32
def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    r"""Spatial attention :math:`A(f)_t = \sum_d |f_{td}|^p`, as a unit vector.

    Source: Zagoruyko & Komodakis, "Paying more attention to attention", ICLR 2017 (arXiv 1612.03928), section 3.1;
    used against backdoors by Li et al., "Neural Attention Distillation", ICLR 2021 (arXiv 2101.05930), section 3.

    Args:
        features: `(B, C, H, W)` or `(B, T, D)`.
        power: exponent p.

    Returns:
        `(B, T)`, rows of length 1.
    """
    return unit(as_tokens(features).abs().pow(power).sum(dim=2))


@in_float32
def channel_gram(features: Tensor) -> Tensor:
    r"""Channel Gram matrix :math:`G = f^\top f`, as a unit vector.

    Source: Gatys et al., "Image style transfer using convolutional neural networks", CVPR 2016, section 2.2.

    Args:
        features: `(B, C, H, W)` or `(B, T, D)`.

    Returns:
        `(B, D * D)`, rows of length 1.
    """
    tokens = as_tokens(features)
    products: Tensor = _Gram.apply(tokens)
    return unit(products)


class _Gram(torch.autograd.Function):
    r""":math:`f^\top f`, with one product on the way back, where autograd, which sees two factors, takes two."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        """Tokens `(B, T, D)` to `(B, D, D)`."""
        ctx.save_for_backward(tokens)
        return tokens.transpose(1, 2) @ tokens

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Differentiable itself."""
        (tokens,) = ctx.saved_tensors
        found: Tensor = tokens @ (gradient + gradient.transpose(1, 2))
        return found


@in_float32
def sample_similarity(features: Tensor) -> Tensor:
    r"""Rows of the pairwise similarity :math:`Q Q^\top` of the samples of a batch, each as a unit vector.

    Source: Tung & Mori, "Similarity-preserving knowledge distillation", ICCV 2019 (arXiv 1907.09682), section 3.

    Args:
        features: `(B, C, H, W)` or `(B, T, D)`.

    Returns:
        `(B, B)`, rows of length 1.
    """
    flat = unit(as_tokens(features))
    return unit(flat @ flat.T)


@in_float32
def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    r"""Flow of solution procedure :math:`G = f_1^\top f_2` between two layers, as a unit vector.

    The finer of two maps is average-pooled to the size of the coarser one. Two token sequences must be equally long.
    Source: Yim et al., "A gift from knowledge distillation", CVPR 2017, section 3.2.

    Args:
        first: `(B, C1, H1, W1)` or `(B, T, D1)`.
        second: `(B, C2, H2, W2)` or `(B, T, D2)`.

    Returns:
        `(B, C1 * C2)`, rows of length 1.
    """
    if first.ndim == 4 and second.ndim == 4 and first.shape[2:] != second.shape[2:]:
        size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
        first, second = (F.adaptive_avg_pool2d(features.float(), size) for features in (first, second))
    left, right = as_tokens(first), as_tokens(second)
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"Expected two layers with the same number of positions, but got {left.shape[1]} and {right.shape[1]}."
        )
    return unit(left.transpose(1, 2) @ right)


@in_float32
def pooled_features(features: Tensor) -> Tensor:
    """Features averaged over all positions, as a unit vector `(B, C)`."""
    return unit(as_tokens(features).mean(dim=1))


@in_float32
def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence :math:`KL(p \| q)` per sample, in nats.

    Args:
        logits_p: `(B, K)` logits of p.
        logits_q: `(B, K)` logits of q.

    Returns:
        `(B,)`, at least 0.
    """
    log_p, log_q = F.log_softmax(logits_p.float(), dim=1), F.log_softmax(logits_q.float(), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


@in_float32
def js_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence per sample, in nats: at most :math:`\ln 2`, so no sample can dominate.

    Args:
        logits_p: `(B, K)` logits of p.
        logits_q: `(B, K)` logits of q.

    Returns:
        `(B,)`, values in [0, ln 2].
    """
    log_p, log_q = F.log_softmax(logits_p.float(), dim=1), F.log_softmax(logits_q.float(), dim=1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return ((log_p.exp() * (log_p - log_m)) + (log_q.exp() * (log_q - log_m))).sum(dim=1) / 2


def defense_effectiveness_rating(acc_before: float, asr_before: float, acc_after: float, asr_after: float) -> float:
    r"""Defence effectiveness rating, :math:`(\max(0, \Delta ASR) - \max(0, \Delta ACC) + 1) / 2`.

    Source: Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization", ICCV 2023
    (arXiv 2304.11823), section 4.1.

    Args:
        acc_before: clean accuracy of the backdoored model, a fraction in [0, 1].
        asr_before: its attack success rate, a fraction in [0, 1].
        acc_after: clean accuracy of the defended model.
        asr_after: its attack success rate.

    Returns:
        A fraction in [0, 1]: 1 is a backdoor removed at no cost, 0.5 is nothing done.

    Example:
        >>> round(defense_effectiveness_rating(0.9, 1.0, 0.88, 0.04), 3)
        0.97
    """
    for name, value in locals().copy().items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"Expected `{name}` to be in [0, 1], but got {value}.")
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1.0) / 2.0
