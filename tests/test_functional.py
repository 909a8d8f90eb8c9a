import math

import numpy as np
import pytest
import torch

from nba_lightning.core import functional as F
from tests.reference import knowledge_forms as reference


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_map_equals_the_equation(maps, power):
    np.testing.assert_allclose(F.attention_map(maps, power), reference.attention_map(maps.numpy(), power), atol=1e-6)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_gram_s_gradient_takes_one_product_and_is_autograd_s(maps, order):
    maps = maps.contiguous(memory_format=order).requires_grad_()
    flat = maps.flatten(2)
    wanted = torch.autograd.grad((F.unit(flat @ flat.transpose(1, 2)) ** 3).sum(), maps)[0]
    loss = (F.channel_gram(maps) ** 3).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = torch.autograd.grad(loss, maps)[0]
    torch.testing.assert_close(found, wanted)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::bmm") == 1
    double = maps.detach()[:2, :2, :2, :2].double().transpose(1, 2).flatten(2).requires_grad_()
    assert torch.autograd.gradgradcheck(F._Gram.apply, double)


@pytest.mark.parametrize("name", ["channel_gram", "sample_similarity"])
def test_forms_equal_the_equations(maps, name):
    np.testing.assert_allclose(getattr(F, name)(maps), getattr(reference, name)(maps.numpy()), atol=1e-6)


def test_fsp_equals_the_equation_and_pools_the_finer_map(maps):
    other = torch.randn(5, 2, 4, 4)
    np.testing.assert_allclose(F.fsp_matrix(maps, other), reference.fsp_matrix(maps.numpy(), other.numpy()), atol=1e-6)
    finer = other.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(F.fsp_matrix(maps, finer), F.fsp_matrix(maps, other))


def test_pooled_features_of_a_constant_map():
    features = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 5, 5)
    torch.testing.assert_close(F.pooled_features(features), torch.tensor([[0.6, 0.8]]))


def test_features_of_a_wrong_rank_are_refused():
    with pytest.raises(ValueError, match="Expected `features` to have shape"):
        F.channel_gram(torch.zeros(2, 2, 2, 2, 2))


def test_divergences_equal_the_equations():
    p, q = torch.randn(6, 4), torch.randn(6, 4)
    np.testing.assert_allclose(F.kl_divergence(p, q), reference.kl_divergence(p.numpy(), q.numpy()), rtol=1e-4)
    middle = ((p.softmax(1) + q.softmax(1)) / 2).log()
    expected = (
        reference.kl_divergence(p.numpy(), middle.numpy()) + reference.kl_divergence(q.numpy(), middle.numpy())
    ) / 2
    np.testing.assert_allclose(F.js_divergence(p, q), expected, rtol=1e-4)


def test_js_divergence_is_bounded_and_has_a_gradient_where_both_are_certain():
    p = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = F.js_divergence(p, torch.tensor([[-200.0, 200.0]]))
    torch.testing.assert_close(value, torch.tensor([math.log(2)]))
    value.sum().backward()
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize(
    ("figures", "der"),
    [
        ((0.9, 1.0, 0.9, 0.0), 1.0),
        ((0.9, 1.0, 0.9, 1.0), 0.5),
        ((0.9, 1.0, 0.4, 1.0), 0.25),
        ((0.9, 0.5, 0.95, 0.7), 0.5),
    ],
)
def test_der_at_closed_values(figures, der):
    assert F.defense_effectiveness_rating(*figures) == pytest.approx(der)


def test_der_refuses_percent():
    with pytest.raises(ValueError, match=r"Expected `asr_before` to be in \[0, 1\], but got 99.0"):
        F.defense_effectiveness_rating(0.9, 99.0, 0.9, 0.1)
