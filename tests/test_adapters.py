import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nba_lightning import NBA, FineTuning
from nba_lightning.attacks import BadNets
from nba_lightning.core.features import features, logits_of, predict
from nba_lightning.io.adapters import Normalized, unpack
from nba_lightning.io.weights import load_weights, save_weights
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import UniversalPerturbations
from tests.test_modules import DEFENSES, build, states_equal


class WithLogits(nn.Module):
    """Answers as networks of Hugging Face do, and so do its layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.feature_layers = ["inner.block2", "inner.block3"]

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.inner(pixel_values), loss=None)


class Dictionaries(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index], "file": f"{index}.png"}


@pytest.fixture
def labelled():
    return torch.rand(48, 1, 8, 8), torch.arange(48) % 10


def test_logits_are_found_wherever_networks_put_them():
    logits = torch.rand(2, 3)
    for output in (logits, {"logits": logits}, SimpleNamespace(logits=logits), (logits, None)):
        assert logits_of(output) is logits
    with pytest.raises(TypeError, match="Expected the network to return logits"):
        logits_of({"scores": logits})


def test_batches_are_unpacked_in_every_shape(labelled):
    images, labels = labelled
    for batch in ((images, labels), [images, labels], {"image": images, "label": labels, "id": ["a"]}):
        found = unpack(batch)
        assert found[0] is images
        assert found[1] is labels
    assert unpack(images) == [images]
    with pytest.raises(ValueError, match="its keys are picture, label"):
        unpack({"picture": images, "label": labels})


@pytest.mark.parametrize("defense", DEFENSES)
def test_every_defense_takes_dictionaries_and_networks_with_logits(defense, trainer, labelled):
    loader = DataLoader(Dictionaries(*labelled), 16)
    network = WithLogits(SmallCNN(width=4, in_channels=1))
    before = copy.deepcopy(network.state_dict())
    module = build(defense, network)
    runner = trainer(max_epochs=2)
    runner.fit(module, loader)
    assert not states_equal(before, network.state_dict())
    assert runner.test(module, loader, verbose=False)[0].keys() == {"test/acc"}
    assert torch.cat(runner.predict(module, loader)).shape == (48, 10)


def test_normalised_loaders_and_networks_give_what_plain_ones_give(trainer, labelled, tmp_path):
    images, labels = labelled
    mean, std = [0.4], [0.3]
    torch.manual_seed(1)
    inner = SmallCNN(width=4, in_channels=1)

    class Plain(nn.Module):
        """The same network with the normalisation inside."""

        def __init__(self):
            super().__init__()
            self.network = copy.deepcopy(inner)
            self.feature_layers = [f"network.{name}" for name in inner.feature_layers]

        def forward(self, images):
            return self.network((images - 0.4) / 0.3)

    def nba(network):
        return NBA(network, teacher_epochs=1, pseudo=UniversalPerturbations(rms=0.2, steps=2), lr=0.01)

    plain, wrapped = nba(Plain()), nba(Normalized(copy.deepcopy(inner), mean, std))
    trainer(max_epochs=2).fit(plain, DataLoader(TensorDataset(images, labels), 16))
    expected = {name.removeprefix("network."): value for name, value in plain.model.state_dict().items()}
    normalised = TensorDataset((images - 0.4) / 0.3, labels)
    trainer(max_epochs=2).fit(wrapped, DataLoader(normalised, 16))
    found = load_file(tmp_path / "cleaned.safetensors")
    assert found.keys() == expected.keys()  # under the inner network's own names
    assert all(torch.allclose(found[name], value, atol=1e-4) for name, value in expected.items())
    assert wrapped.pseudo.bank.abs().max() > 0
    assert torch.allclose(wrapped.pseudo.bank, plain.pseudo.bank, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_black_and_white_pixels_survive_the_rounding_of_a_normalisation(precision, trainer):
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    images = (torch.rand(32, 3, 8, 8) > 0.5).float()
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    network = Normalized(SmallCNN(width=4), mean, std)
    trainer(precision=precision).fit(FineTuning(network), DataLoader(TensorDataset(normalised, torch.arange(32) % 10)))
    assert torch.allclose(network.denormalize(normalised), images, atol=0.01)


def test_a_wrong_normalisation_is_told(trainer, labelled):
    images, labels = labelled
    module = FineTuning(Normalized(SmallCNN(width=4, in_channels=1), [0.4], [0.3]))
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        trainer().fit(module, DataLoader(TensorDataset(images * 10, labels), 16))
    with pytest.raises(ValueError, match="`std` to be in"):
        Normalized(nn.Identity(), [0.0], [0.0])
    with pytest.raises(ValueError, match="`std` to be as long as `mean`"):
        Normalized(nn.Identity(), [0.0, 0.1], [1.0])


def test_a_normalised_network_loads_its_own_weights(tmp_path):
    inner = SmallCNN(width=4, in_channels=1)
    save_weights(inner.state_dict(), tmp_path / "w.safetensors")
    wrapped = Normalized(SmallCNN(width=4, in_channels=1), [0.5], [0.5], loaders_normalize=False)
    load_weights(wrapped, tmp_path / "w.safetensors")
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(predict(wrapped.eval(), images), inner.eval()((images - 0.5) / 0.5))
    assert unpack((images, None), wrapped)[0] is images


def test_features_of_layers_that_return_objects():
    class Layer(nn.Module):
        def forward(self, images):
            return {"last_hidden_state": images.flatten(2).transpose(1, 2), "attentions": None}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, images):
            return {"logits": self.layer(images)["last_hidden_state"].mean(dim=1)}

    logits, found = features(Net(), torch.rand(2, 3, 4, 4), ["layer"])
    assert logits.shape == (2, 3)
    assert found["layer"].shape == (2, 16, 3)


def test_somebody_s_lightning_module_is_a_network_too(trainer, labelled, clean_digits):
    class Theirs(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = SmallCNN(width=4, in_channels=1)

        def forward(self, x):
            return self.backbone(x)

        def training_step(self, batch, batch_idx):
            raise AssertionError("not ours to call")

    theirs = Theirs()
    before = copy.deepcopy(theirs.state_dict())
    clean_digits.attack = BadNets()
    module = NBA(theirs, layers=["backbone.block2"], teacher_epochs=1, pseudo=UniversalPerturbations(steps=1))
    runner = trainer(max_epochs=2)
    runner.fit(module, clean_digits)
    assert not states_equal(before, theirs.state_dict())
    assert {"test/asr", "test/ra"} <= runner.test(module, clean_digits, verbose=False)[1].keys()
