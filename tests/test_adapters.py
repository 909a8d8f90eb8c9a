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
from nba_lightning.io.adapters import Normalized, Output
from nba_lightning.io.batches import Batch, as_batch
from nba_lightning.io.weights import load_weights, save_weights
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import UniversalPerturbations
from tests.test_modules import DEFENSES, another, build, states_equal


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
    for output in (logits, {"logits": logits}, SimpleNamespace(logits=logits)):
        assert logits_of(output) is logits
    with pytest.raises(TypeError, match="Expected the network to return logits"):
        logits_of({"scores": logits})
    with pytest.raises(TypeError, match=r"but got a tuple of 2 parts\. Say which part they are: .*Output"):
        logits_of((torch.rand(2, 5), logits))


class Both(nn.Module):
    """Returns features and logits, as networks for metric learning do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = SmallCNN(num_classes=12, width=4, in_channels=1), nn.Linear(12, 10)
        self.feature_layers = ["body.block2", "body.block3"]

    def forward(self, images):
        found = self.body(images)
        return found, self.head(found)


def test_a_network_that_returns_several_things_is_asked_which(trainer, labelled, tmp_path):
    loader = DataLoader(TensorDataset(*labelled), 16)
    with pytest.raises(TypeError, match="Say which part"):
        trainer().fit(FineTuning(Both()), loader)
    inner = Both()
    before = copy.deepcopy(inner.state_dict())
    module = FineTuning(Output(inner, 1))
    assert module(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    trainer().fit(module, loader)
    assert not torch.equal(before["head.weight"], inner.head.weight)
    assert load_file(tmp_path / "cleaned.safetensors").keys() == before.keys()


def test_batches_are_read_in_every_shape(labelled):
    images, labels = labelled
    for batch in ((images, labels), [images, labels], {"image": images, "label": labels, "id": ["a"]}):
        found = as_batch(batch)
        assert found.images is images
        assert found.labels is labels
        assert found.targets is None
    for alone in (images, [images], {"pixel_values": images}):
        assert as_batch(alone).images is images
        assert as_batch(alone).labels is None
    with pytest.raises(ValueError, match="its keys are picture, label"):
        as_batch({"picture": images, "label": labels})


def test_what_order_alone_would_tell_is_refused(labelled, trainer):
    images, labels = labelled
    indexed = TensorDataset(images, labels, torch.arange(48))
    with pytest.raises(ValueError, match=r"Expected a batch to be \(images, labels\), but got 3 parts"):
        trainer().fit(FineTuning(SmallCNN(width=4, in_channels=1)), DataLoader(indexed, 16))
    with pytest.raises(ValueError, match="but got 3 parts"):
        trainer().test(FineTuning(SmallCNN(width=4, in_channels=1)), DataLoader(indexed, 16), verbose=False)


def test_a_batch_unpacks_and_moves_as_a_whole(labelled):
    images, labels = labelled
    batch = Batch(images, labels, indices=torch.arange(48))
    assert [part is wanted for part, wanted in zip(batch, (images, labels), strict=True)] == [True, True]
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.indices.device.type} == {"meta"}
    targets = torch.zeros(48)
    assert list(Batch(images, labels, targets))[2] is targets


def test_predicting_needs_no_labels(trainer):
    items = [{"pixel_values": torch.rand(1, 8, 8)} for _ in range(8)]
    module = FineTuning(SmallCNN(width=4, in_channels=1))
    assert torch.cat(trainer().predict(module, DataLoader(items, 4))).shape == (8, 10)
    with pytest.raises(ValueError, match="Expected a batch with labels, but got images alone"):
        trainer().fit(module, DataLoader(items, 4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(48) % 12, "classes 0 to 9 of the network, but got 11"),
        (torch.arange(48) - 1, "classes 0 to 9 of the network, but got -1"),
        ((torch.arange(48) % 10).float(), r"class numbers, integers of shape \(B,\), but got float32"),
        (nn.functional.one_hot(torch.arange(48) % 10), r"but got int64 of shape \(16, 10\)"),
    ],
)
def test_labels_that_are_no_classes_of_the_network_are_named(labels, message, trainer, labelled):
    loader = DataLoader(TensorDataset(labelled[0], labels), 16)
    for run in ("fit", "test"):
        with pytest.raises(ValueError, match=f"Expected `labels` to be .*{message}"):
            getattr(trainer(), run)(FineTuning(SmallCNN(width=4, in_channels=1)), loader)


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
        return NBA(network, teacher=another(network), pseudo=UniversalPerturbations(rms=0.2, steps=2), lr=0.01)

    plain, wrapped = nba(Plain()), nba(Normalized(copy.deepcopy(inner), mean, std, loaders_normalize=True))
    trainer(max_epochs=2).fit(plain, DataLoader(TensorDataset(images, labels), 16))
    expected = {name.removeprefix("network."): value for name, value in plain.model.state_dict().items()}
    normalised = TensorDataset((images - 0.4) / 0.3, labels)
    trainer(max_epochs=2).fit(wrapped, DataLoader(normalised, 16))
    found = load_file(tmp_path / "cleaned-v1.safetensors")  # of the second fit
    assert found.keys() == expected.keys()  # under the inner network's own names
    assert all(torch.allclose(found[name], value, atol=1e-4) for name, value in expected.items())
    assert wrapped.pseudo.bank.abs().max() > 0
    assert torch.allclose(wrapped.pseudo.bank, plain.pseudo.bank, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_black_and_white_pixels_survive_the_rounding_of_a_normalisation(precision, trainer):
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    images = (torch.rand(32, 3, 8, 8) > 0.5).float()
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    network = Normalized(SmallCNN(width=4), mean, std, loaders_normalize=True)
    trainer(precision=precision).fit(FineTuning(network), DataLoader(TensorDataset(normalised, torch.arange(32) % 10)))
    assert torch.allclose(network.denormalize(normalised), images, atol=0.01)


def test_a_wrong_normalisation_is_told(trainer, labelled, clean_digits):
    images, labels = labelled
    normalised = DataLoader(TensorDataset((images - 0.4) / 0.3, labels), 16)

    def module(**kwargs):
        return FineTuning(Normalized(SmallCNN(width=4, in_channels=1), [0.4], [0.3], **kwargs))

    for run in ("fit", "test", "predict"):
        with pytest.raises(ValueError, match=r"values in \[0, 1\].*loaders_normalize=True"):
            getattr(trainer(), run)(module(), normalised)  # the loader normalises, and nobody said so
        with pytest.raises(ValueError, match="images to be normalised, as `loaders_normalize` says"):
            getattr(trainer(), run)(module(loaders_normalize=True), DataLoader(TensorDataset(images, labels), 16))
        with pytest.raises(ValueError, match="Expected `loaders_normalize` to be false for a data module"):
            getattr(trainer(), run)(module(loaders_normalize=True), datamodule=clean_digits)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        trainer().fit(module(), DataLoader(TensorDataset(images * 10, labels), 16))
    with pytest.raises(ValueError, match=r"`images` to hold values in \[0, 1\], but got NaN"):
        trainer().fit(module(), DataLoader(TensorDataset(images * float("nan"), labels), 16))
    with pytest.raises(ValueError, match="`std` to be in"):
        Normalized(nn.Identity(), [0.0], [0.0])
    with pytest.raises(ValueError, match="`std` to be as long as `mean`"):
        Normalized(nn.Identity(), [0.0, 0.1], [1.0])
    with pytest.raises(ValueError, match=r"Expected `mean` to be one value or one for each channel"):
        Normalized(nn.Identity(), [0.1] * 3, [1.0] * 3)(images)  # grey images


def test_the_inner_network_sees_normalised_images(trainer, clean_digits):
    inner, seen = SmallCNN(width=4, in_channels=1), []
    inner.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    trainer().test(FineTuning(Normalized(inner, [0.9], [0.1])), datamodule=clean_digits, verbose=False)
    images = clean_digits.source.load()[1].images.float() / 255
    tested = [batch for batch in seen if len(batch) > 2]  # beside looks at whether all fits
    torch.testing.assert_close(torch.cat(tested)[: len(images)], (images - 0.9) / 0.1)


def test_a_normalised_network_loads_its_own_weights(tmp_path):
    inner = SmallCNN(width=4, in_channels=1)
    save_weights(inner.state_dict(), tmp_path / "w.safetensors")
    wrapped = Normalized(SmallCNN(width=4, in_channels=1), [0.5], [0.5])
    load_weights(wrapped, tmp_path / "w.safetensors")
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(predict(wrapped.eval(), images), inner.eval()((images - 0.5) / 0.5))
    assert as_batch((images, None), wrapped).images is images


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
    module = NBA(theirs, teacher=another(theirs), layers=["backbone.block2"], pseudo=UniversalPerturbations(steps=1))
    runner = trainer(max_epochs=2)
    runner.fit(module, clean_digits)
    assert not states_equal(before, theirs.state_dict())
    assert {"test/asr", "test/ra"} <= runner.test(module, clean_digits, verbose=False)[1].keys()
