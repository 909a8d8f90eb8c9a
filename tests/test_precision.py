"""Half precision, compiled networks, channels-last order: the same method."""

import copy

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from nba_lightning import (
    ANP,
    BAN,
    IBAU,
    NAD,
    NBA,
    NPD,
    RNP,
    SAU,
    BackdoorDataModule,
    Classifier,
    FinePruning,
    FineTuning,
    InputAwareTraining,
)
from nba_lightning.attacks import BadNets, InputAware
from nba_lightning.behaviors import FSP, AttentionMap, ChannelGram, PooledFeatures, SampleSimilarity
from nba_lightning.core.features import features
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import JSDisagreement, KLDisagreement, UniversalPerturbations
from nba_lightning.training.compilation import compile_regions, regions, undo_compile
from tests.test_modules import DEFENSES, build, states_equal

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", [AttentionMap, ChannelGram, FSP, PooledFeatures, SampleSimilarity])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_behaviors_in_half_precision_are_those_of_float32(form, dtype, scale):
    # 300 squared, summed over 256 positions, is far above float16's 65,504; 0.001 squared is far below its 6e-8.
    maps = {"a": scale * torch.randn(4, 8, 16, 16), "b": scale * torch.randn(4, 6, 8, 8)}
    half = form()({name: value.to(dtype) for name, value in maps.items()})
    for name, value in form()({name: value.to(dtype).float() for name, value in maps.items()}).items():
        assert half[name].dtype == torch.float32
        assert torch.allclose(half[name], value, atol=1e-5)
        assert torch.allclose(half[name].norm(dim=1), torch.ones(len(value)), atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", [AttentionMap, ChannelGram, FSP, PooledFeatures, SampleSimilarity])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_behaviors_under_autocast_are_those_of_float32(form, dtype, scale):
    """Autocast casts matrix products back to half, where 300 squared overflows to NaN in float16."""
    maps = {"a": scale * torch.randn(4, 8, 16, 16), "b": scale * torch.randn(4, 6, 8, 8)}
    maps = {name: value.requires_grad_() for name, value in maps.items()}
    wanted = form()(maps)
    with torch.autocast("cpu", dtype):
        found = form()(maps)
    for name, value in wanted.items():
        assert torch.equal(found[name], value)
        gradients = [
            torch.autograd.grad(v[name][:, 0].sum(), maps["a" if form is FSP else name])[0] for v in (found, wanted)
        ]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("disagreement", [None, JSDisagreement()])
def test_pseudo_samples_in_half_precision_point_where_float32_ones_do(disagreement):
    torch.manual_seed(0)
    student, teacher = SmallCNN(width=8, in_channels=1).eval(), SmallCNN(width=8, in_channels=1).eval()
    images = torch.rand(32, 1, 8, 8)

    def craft(half):
        made = UniversalPerturbations(2, rms=0.2, steps=5, disagreement=disagreement)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            made.regenerate(student, teacher, iter([images] * 5), torch.Generator().manual_seed(1), lambda t: t)
        return made.bank

    whole, half = craft(False), craft(True)
    measure = disagreement or KLDisagreement()

    def reached(bank):
        inputs = (images + bank[:1]).clamp(0, 1)
        return measure(student(inputs), teacher(inputs)).mean().item()

    assert half.dtype == torch.float32
    assert torch.cosine_similarity(whole.flatten(1), half.flatten(1)).min() > 0.9
    assert reached(half) == pytest.approx(reached(whole), rel=0.1)
    assert reached(half) > 1.1 * reached(torch.zeros_like(half))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("defense", [Classifier, *DEFENSES])
def test_everything_trains_in_half_precision(defense, precision, network, clean_digits, trainer):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = build(defense, network)
    runner = trainer(max_epochs=2, precision=precision)
    runner.fit(module, clean_digits)
    assert not states_equal(before, {name: value.float() for name, value in module.model.state_dict().items()})
    assert all(torch.isfinite(value).all() for value in module.model.state_dict().values())
    assert runner.test(module, clean_digits, verbose=False)[1]["test/asr"] >= 0


def test_sau_s_small_gradients_keep_their_signs_in_float16():
    module = SAU(SmallCNN(width=8, in_channels=1), steps=1, adversarial=1e-4, shared=0).eval()
    images = torch.rand(64, 1, 8, 8)
    labels = module(images).argmax(dim=1)
    whole = module.craft(images, labels, [labels, labels])
    with torch.autocast("cpu", torch.float16):
        half = module.craft(images, labels, [labels, labels])
    assert (whole == half).float().mean() > 0.9


def test_joint_training_in_half_precision(network, trainer):
    data = BackdoorDataModule(attack=InputAware(width=8), train_on="untriggered", batch_size=256)
    runner = trainer(max_epochs=2, precision="bf16-true")
    runner.fit(InputAwareTraining(network, mask_epochs=1), data)
    assert runner.test(Classifier(network), data, verbose=False)[1]["test/asr"] >= 0


def test_a_nearly_empty_mask_can_grow_again_in_bfloat16():
    attack = InputAware(width=8)
    attack.prepare((1, 8, 8), 10)
    nn.init.zeros_(attack.mask_network.last.weight)
    nn.init.constant_(attack.mask_network.last.bias, -1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mask = attack.mask(torch.rand(2, 1, 8, 8))
    assert mask.dtype == torch.float32
    assert mask.max() < 1e-5
    mask.sum().backward()
    assert (attack.mask_network.last.bias.grad > 0).all()


def test_a_backdoor_is_implanted_in_bfloat16_as_in_float32(trainer):
    rates = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = Classifier(SmallCNN(width=8, in_channels=1))
        data = BackdoorDataModule(attack=BadNets(), batch_size=64)
        runner = trainer(max_epochs=5, precision=precision)
        runner.fit(module, data)
        rates[precision] = runner.test(module, data, verbose=False)
    for whole, half in zip(rates["32-true"], rates["bf16-mixed"], strict=True):
        assert half == pytest.approx(whole, abs=0.05)
    assert rates["bf16-mixed"][1]["test/asr"] > 0.9


def test_images_are_converted_last(clean_digits, trainer):
    class Look(FineTuning):
        def training_step(self, batch, batch_idx):
            assert batch.images.dtype == torch.bfloat16
            return super().training_step(batch, batch_idx)

    trainer(max_steps=1, precision="bf16-true").fit(Look(SmallCNN(width=4, in_channels=1)), clean_digits)
    assert clean_digits.trainer.precision_plugin is not Precision


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Flatten())
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        return self.fc(self.body(self.stem(images)))


def test_regions_hold_no_observed_layer_inside():
    network = Nested()
    assert regions(network, []) == [network]
    assert regions(network, ["body"]) == [network.stem, network.body, network.fc]
    assert regions(network, ["body.1"]) == [network.stem, network.body[0], network.body[1], network.fc]
    assert regions(network, ["body.1.0"]) == [network.stem, network.body[0], network.body[1][0], network.fc]


def test_hooks_see_every_pass_of_a_compiled_network():
    network, images = Nested().eval(), torch.rand(2, 1, 8, 8)
    expected, maps = features(network, images, ["body.1"])
    compile_regions(network, ["body.1"], "eager")
    assert "forward" in vars(network.stem)
    assert torch.allclose(network(images), expected, atol=1e-6)  # once without hooks, before any
    for factor in (1.0, 0.5, 2.0):
        _, found = features(network, factor * images, ["body.1"])
        undone = copy.deepcopy(network)
        undo_compile(undone)
        assert torch.allclose(found["body.1"], features(undone, factor * images, ["body.1"])[1]["body.1"], atol=1e-6)
    undo_compile(network)
    assert not any("forward" in vars(module) for module in network.modules())
    assert maps["body.1"].shape == found["body.1"].shape


def test_a_forward_of_the_user_s_own_survives_compilation():
    network, images = Nested().eval(), torch.rand(2, 1, 8, 8)
    network.fc.forward = own = lambda maps: maps[:, :10] * 2
    wanted = network(images)
    for _ in range(2):  # the second takes back what the first, which broke off, has left
        compile_regions(network, ["body.1"], "eager")
        assert torch.allclose(network(images), wanted)
    copied = copy.deepcopy(network)
    for found in (network, copied):
        undo_compile(found)
        assert torch.equal(found(images), wanted)
        assert [name for name, module in found.named_modules() if "forward" in vars(module)] == ["fc"]
    assert network.fc.forward is own
    undo_compile(network)  # of one that is not compiled
    assert network.fc.forward is own


@pytest.mark.parametrize("where", ["whole", "inside", "in place"])
def test_an_already_compiled_network_is_refused(where):
    network = Nested()
    if where == "whole":
        network = torch.compile(network, backend="eager")
    elif where == "inside":
        network.stem = torch.compile(network.stem, backend="eager")
    else:
        network.body.compile(backend="eager")
    with pytest.raises(ValueError, match="Expected `model` to be a network that is not compiled yet, but got one with"):
        compile_regions(network, [], "eager")
    assert not any("forward" in vars(module) for module in Nested().modules())


@pytest.mark.parametrize("defense", [d for d in [Classifier, *DEFENSES] if d.compilable])
def test_compiled_and_channels_last_training_is_the_same(defense, network, clean_digits, trainer):
    plain, fast = copy.deepcopy(network), copy.deepcopy(network)
    trainer(max_epochs=2).fit(build(defense, plain), clean_digits)
    data = BackdoorDataModule(attack=BadNets(), train_on="clean", batch_size=16)
    trainer(max_epochs=2).fit(build(defense, fast, compile="eager", channels_last=True), data)
    assert all(torch.allclose(value, fast.state_dict()[name], atol=2e-3) for name, value in plain.state_dict().items())
    assert fast.block2[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any("forward" in vars(module) for module in fast.modules())


@pytest.mark.parametrize("defense", [ANP, BAN, IBAU, NPD, RNP])
def test_methods_that_cannot_be_compiled_say_so(defense, network):
    with pytest.raises(ValueError, match=f"`compile` to be false for {defense.__name__}"):
        defense(network, compile=True)


def test_observed_layers_bound_the_regions(network):
    for module in (NBA(network), NAD(network)):
        assert module.observed_layers() == list(network.feature_layers)
    assert FinePruning(network).observed_layers() == ["fc"]
