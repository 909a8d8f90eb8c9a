import pytest
import torch

import nba_lightning.behaviors as behaviors
from nba_lightning.behaviors import FSP, Behavior, ChannelGram, alignment_loss


def subclasses(base):
    return [cls for child in base.__subclasses__() for cls in (child, *subclasses(child))]


FORMS = subclasses(Behavior)


def features(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 3, 8, 8), "b": (6, 5, 4, 4)}
    return {name: (scale * torch.randn(s, generator=generator)).to(dtype) for name, s in shapes.items()}


def test_all_forms_are_exported():
    assert {form.__name__ for form in FORMS} <= set(behaviors.__all__)
    assert len(FORMS) >= 5


@pytest.mark.parametrize("form", FORMS)
def test_behaviors_are_unit_vectors_that_ignore_the_scale(form):
    one, ten = form()(features()), form()(features(scale=10.0))
    for name, value in one.items():
        assert value.shape[0] == 6
        torch.testing.assert_close(value.norm(dim=1), torch.ones(6))
        torch.testing.assert_close(value, ten[name])


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_described_like_the_same_feature_map(form):
    maps = {name: value[..., :4, :4] for name, value in features().items()}
    tokens = {name: value.flatten(2).transpose(1, 2) for name, value in maps.items()}
    from_maps, from_tokens = form()(maps), form()(tokens)
    for name, value in from_maps.items():
        torch.testing.assert_close(value, from_tokens[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_half_precision_neither_overflows_nor_underflows(form, scale):
    half, full = form()(features(torch.float16, scale)), form()(features(scale=scale))
    for name, value in full.items():
        torch.testing.assert_close(half[name], value, atol=2e-2, rtol=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_right(form):
    inputs = [f[:2].double().requires_grad_() for f in features().values()]
    form().double()

    def describe(*values):
        return tuple(form()(dict(zip("ab", (v.float() for v in values), strict=True))).values())

    assert torch.autograd.gradcheck(describe, inputs, eps=1e-2, atol=5e-2, rtol=5e-2, fast_mode=True)


def test_alignment_loss_is_zero_for_equal_four_for_opposite():
    one = ChannelGram()(features())
    assert float(alignment_loss(one, one)) == 0.0
    assert float(alignment_loss(one, {k: -v for k, v in one.items()})) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="Expected the same layers"):
        alignment_loss(one, {"a": one["a"]})


def test_fsp_relates_adjacent_layers():
    assert list(FSP()(features())) == ["a->b"]
    assert FSP.min_layers == 2
