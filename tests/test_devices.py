"""Where there is no GPU: nothing of a step stays on the host. The device `meta` stands in for one."""

import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nba_lightning import BTIDBF, IBAU, NBA, BackdoorDataModule, Unlearning
from nba_lightning.attacks.base import CROSS, POISONED
from nba_lightning.core import randomness
from nba_lightning.core.augmentation import RandomCropFlip
from nba_lightning.core.modes import placed
from nba_lightning.defenses.bti_dbf import Inversion
from nba_lightning.io.batches import Batch
from nba_lightning.pseudo import (
    ClassPatches,
    ClassPerturbations,
    SamplePerturbations,
    TriggerFamilies,
    UniversalPerturbations,
)
from nba_lightning.training.redrawn_head import RedrawnHead
from tests.attack_zoo import ATTACKS
from tests.attack_zoo import build as build_attack
from tests.helpers import batch, lively, ready
from tests.test_modules import DEFENSES, build

META = torch.device("meta")
ALLOWED = {torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__}
ALLOWED |= {torch._has_compatible_shallow_copy_type}  # asked by `Module.to`
"""What takes tensors of two devices on a GPU too; an index may lie on the host."""


class Generator(torch.Generator):
    """One of the host that says for which device it was made; there are none for `meta`."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.wanted = torch.device(device).type
        return made


class Strict(TorchFunctionMode):
    """Refuses to mix devices where CUDA does, and to draw for one with the generator of another."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(kwargs.get("generator"), Generator):
            assert kwargs["generator"].wanted == torch.device(kwargs.get("device") or "cpu").type, f"generator: {func}"
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}
        assert len(devices) < 2 or func in ALLOWED, f"two devices: {func}"
        return func(*args, **kwargs)


@pytest.fixture
def elsewhere(monkeypatch):
    """Generators for any device, as there are for GPUs."""
    parts = {"Generator": Generator, "randperm": torch.randperm, "device": torch.device}
    monkeypatch.setattr(randomness, "torch", types.SimpleNamespace(**parts))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("defense", DEFENSES)
def test_a_step_and_its_gradient_are_all_on_the_device(defense, network, trainer):
    module = ready(build(defense, lively(network)), trainer).to(META)
    if isinstance(module, RedrawnHead):  # as a checkpoint brings it back
        module.path, module.initial = "fc", torch.ones(10, 16)
    if isinstance(module, IBAU):
        module.perturbation = torch.zeros(1, 1, 8, 8)
    if isinstance(module, NBA):
        module.pseudo = TriggerFamilies()
    if isinstance(module, Unlearning):
        for source in module.crafted:
            source.bank = torch.zeros(16, 1, 8, 8)
    if isinstance(module, BTIDBF):
        module.inversion = Inversion(lambda images: images, None)
    images, labels = (part.to(META) for part in batch(16))
    with Strict():
        loss = module.training_step((images, labels), 1)  # not the first batch, whose values are read
        gradients = torch.autograd.grad(loss, module.trained_parameters(), allow_unused=True)
    assert loss.device == META
    assert any(gradient is not None for gradient in gradients)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "made", [ClassPatches(2, 2), ClassPerturbations(), UniversalPerturbations(), SamplePerturbations()]
)
def test_pseudo_samples_are_crafted_on_the_device(made, network):
    student, images = network.to(META), torch.rand(8, 1, 8, 8, device=META)
    generator = randomness.generator_for(0, device=META)
    with Strict():
        made.regenerate(student, student, [images], generator)
        assert made(images, student, student, generator).device == META


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("attack_class", ATTACKS)
def test_batches_are_triggered_and_augmented_on_the_device(attack_class):
    data = BackdoorDataModule(attack=build_attack(attack_class), augment=RandomCropFlip(1))
    roles = torch.tensor([POISONED, CROSS, 0, POISONED], dtype=torch.uint8)  # which stay on the host
    given = Batch(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), roles=roles, places=torch.arange(4))
    for stage in ("train", "evaluate"):
        moved = replace(given, stage=stage).to(META)
        with Strict():
            found = data.on_after_batch_transfer(moved, 0)
        assert {found.images.device, found.labels.device} == {META}


def test_a_network_that_was_placed_goes_back():
    seen = []

    class Movable(nn.Linear):
        def to(self, device):
            seen.append(str(device))

    with placed(Movable(2, 2), torch.device("cuda")):
        assert seen == ["cuda"]
    assert seen == ["cuda", "cpu"]
