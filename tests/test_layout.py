import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from nba_lightning import BackdoorDataModule, FineTuning
from nba_lightning.networks import SmallCNN
from nba_lightning.training.layout import arrange, prefers_channels_last, restore

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Viewing(nn.Module):
    """A network that flattens by `view`, which channels-last features do not allow."""

    def __init__(self, width=4):
        super().__init__()
        self.convolution, self.fc = nn.Conv2d(1, width, 3, padding=1), nn.Linear(64 * width, 10)

    def forward(self, images):
        features = self.convolution(images)
        return self.fc(features.view(len(features), -1))


def last(network):
    return any(
        not module.weight.is_contiguous() and module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    )


@pytest.mark.parametrize(
    ("device", "precision", "wanted"),
    [
        (CPU, "32-true", True),
        (CPU, "bf16-mixed", True),
        (CPU, "64-true", False),
        (GPU, "32-true", False),
        (GPU, "bf16-mixed", True),
        (GPU, "16-true", True),
        (torch.device("mps"), "16-mixed", False),
    ],
)
def test_device_and_numbers_decide(device, precision, wanted, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert prefers_channels_last(device, precision) is wanted


def test_a_processor_without_onednn_keeps_the_usual_order(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not prefers_channels_last(CPU, "32-true")


@pytest.mark.parametrize("shape", [(1, 8, 8), None])
def test_only_networks_that_bear_it_are_changed_and_they_are_changed_back(shape, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    bears, views, chosen = SmallCNN(width=4, in_channels=1), Viewing(), SmallCNN(width=4, in_channels=1)
    chosen.to(memory_format=torch.channels_last)
    wanted = {name: value.clone() for name, value in bears.state_dict().items()}
    changed = arrange([bears, views, nn.Flatten(), chosen], CPU, "32-true", shape)
    assert changed == ([bears] if shape else [])
    assert last(bears) is bool(shape)
    assert not last(views)
    views(torch.rand(2, 1, 8, 8))
    restore(changed)
    assert not last(bears)
    assert last(chosen)  # by its owner, who keeps it
    assert all(torch.equal(value, wanted[name]) for name, value in bears.state_dict().items())


@pytest.mark.parametrize(("asked", "wanted"), [(None, True), (False, False), (True, True)])
def test_a_fit_takes_the_faster_order_records_it_and_obeys_the_user(asked, wanted, trainer, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    seen, logged = [], []

    class Watched(FineTuning):
        def on_fit_start(self):
            seen.append(last(self.model))
            super().on_fit_start()

    runner = trainer(limit_train_batches=1, logger=LoggedTo(logged))
    module = Watched(SmallCNN(width=4, in_channels=1), channels_last=asked)
    runner.fit(module, datamodule=BackdoorDataModule(train_on="clean", batch_size=16))
    assert seen == [wanted]
    assert logged[0]["channels_last"] is wanted
    assert last(module.model) is (asked is True)


@pytest.mark.parametrize(("asked", "wanted"), [(None, True), (False, False)])
def test_a_test_takes_the_faster_order_without_a_word_of_it(asked, wanted, trainer, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    seen = []

    class Watched(FineTuning):
        def on_test_start(self):
            seen.append(last(self.model))

    module = Watched(SmallCNN(width=4, in_channels=1), channels_last=asked)
    with caplog.at_level("INFO"):
        trainer().test(module, datamodule=BackdoorDataModule(train_on="clean", batch_size=16), verbose=False)
    assert seen == [wanted]
    assert not last(module.model)
    assert "channels-last" not in caplog.text


class LoggedTo(Logger):
    """A logger of which only the hyperparameters are looked at."""

    name, version = "found", 0

    def __init__(self, found):
        super().__init__()
        self.found = found

    def log_hyperparams(self, values, *_):
        self.found.append(values)

    def log_metrics(self, metrics, step=None):
        pass
