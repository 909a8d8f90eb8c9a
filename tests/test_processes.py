"""Two processes do what one does with the same global batch. CPU, gloo."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from nba_lightning import D3, FST, NBA, Classifier, FineTuning, InputAwareTraining
from nba_lightning.io.weights import load_weights
from nba_lightning.pseudo import LatentPerturbations
from nba_lightning.training.sharding import blocks_of, prepare_sharding
from tests.helpers import drifted
from tests.processes.cases import AGREE, SAME, run
from tests.processes.sharded import SHARDED, Layered

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    """What two processes found, and what one finds, of the cases that the chosen tests ask for."""
    asking = [item for item in request.session.items if "both" in getattr(item, "fixturenames", ())]
    named = {item.callspec.params["name"] for item in asking if hasattr(item, "callspec")}
    names = sorted(named) if all(hasattr(item, "callspec") for item in asking) else [*SAME, *AGREE, *SHARDED]
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, "-m", "tests.processes.cases", str(folder), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, ranks, run(tmp_path_factory.mktemp("one"), 1, names)


def close(first, second, **tolerance):
    return first.keys() == second.keys() and all(
        torch.allclose(value.float(), second[name].float(), **tolerance) for name, value in first.items()
    )


def test_subsets_and_pseudo_samples_are_the_same_everywhere(both):
    _, ranks, one = both
    for name, indices in one["partition"].items():
        assert all(torch.equal(rank["partition"][name], indices) for rank in ranks), name
    assert torch.equal(ranks[0]["bank"], ranks[1]["bank"])
    assert ranks[0]["bank"].abs().max() > 0.01
    assert torch.allclose(ranks[0]["bank"], one["bank"], atol=1e-4)


@pytest.mark.parametrize("name", SAME)
def test_the_same_global_batch_gives_the_same_weights(both, name):
    _, ranks, one = both
    assert close(ranks[0][name], ranks[1][name], rtol=0, atol=0)
    assert close(ranks[0][name], one[name], atol=2e-4)


@pytest.mark.parametrize("name", SAME)
def test_metrics_count_every_image_once(both, name):
    """1,797 - 1,438 = 359 images and 323 triggered ones divide neither by 2 nor by 13."""
    _, ranks, one = both
    for rank in ranks:
        for found, expected in zip(rank[f"{name}/metrics"], one[f"{name}/metrics"], strict=True):
            # The weights differ in the last bits, so an image on the border may change sides.
            assert found == pytest.approx(expected, abs=1.5 / 323)


@pytest.mark.parametrize("name", AGREE)
def test_what_depends_on_the_split_still_agrees_on_all_processes(both, name):
    _, ranks, _ = both
    learned = {key for key in ranks[0][name] if "running" not in key}  # statistics are each process's own
    for key in learned:
        assert torch.equal(ranks[0][name][key], ranks[1][name][key]), key


def test_only_the_first_process_writes(both):
    folder, _, _ = both
    assert len(list((folder / "nba").rglob("cleaned.safetensors"))) == 1
    assert len(list((folder / "agree").rglob("last.ckpt"))) == 1


def test_metrics_are_exact_on_the_same_weights(tmp_path, both):
    """To the last image: the same weights, tested by one process and by two."""
    _, ranks, _ = both
    from tests.processes.cases import data, network, trainer

    model = network()
    model.load_state_dict(ranks[0]["fine_tuning"])
    alone = trainer(tmp_path, 1).test(Classifier(model), data(1), verbose=False)
    for found, expected in zip(ranks[0]["fine_tuning/metrics"], alone, strict=True):
        assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_network_learns_what_a_whole_one_learns(both, name):
    """And is evaluated alike, by the first process's BatchNorm statistics on all; so are the guard's figures."""
    _, ranks, _ = both
    whole, sharded = ranks[0][f"{name}/ddp"], ranks[0][f"{name}/fsdp2"]
    assert sharded["sharded"]
    assert not whole["sharded"]
    assert close(sharded["weights"], whole["weights"], atol=1e-5)
    fresh = Layered().state_dict()
    assert {key: value.shape for key, value in sharded["weights"].items()} == {k: v.shape for k, v in fresh.items()}
    for rank in ranks:
        assert close(rank[f"{name}/fsdp2"]["statistics"], sharded["statistics"], rtol=0, atol=0)
        assert rank[f"{name}/fsdp2"]["val"] == pytest.approx(whole["val"], abs=1e-6)
        for found, expected in zip(rank[f"{name}/fsdp2"]["metrics"], whole["metrics"], strict=True):
            assert found == pytest.approx(expected, abs=1e-6)
    if sharded["guard"]:
        assert sharded["guard"]["suspicious"] == whole["guard"]["suspicious"]
        assert sharded["guard"]["student"] == pytest.approx(sharded["val"]["val/acc"], abs=1e-6)


@pytest.mark.parametrize("name", SHARDED)
def test_files_of_a_sharded_network_are_whole(both, name):
    folder, ranks, _ = both
    files = [folder / "sharded" / name / "fsdp2" / "checkpoints" / "epoch=1.ckpt"]
    if name == "sharded_fine_tuning":
        files += (folder / "sharded" / name / "fsdp2").rglob("cleaned.safetensors")
        assert len(files) == 2
    for file in files:
        network = Layered()
        load_weights(network, file)
        assert close(network.state_dict(), ranks[0][f"{name}/fsdp2"]["weights"], rtol=0, atol=0), file


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_fit_goes_on_from_its_checkpoint(both, name):
    _, ranks, _ = both
    assert close(ranks[0][f"{name}/resumed"]["weights"], ranks[0][f"{name}/fsdp2"]["weights"], atol=1e-6)


def under(module, runner, strategy):
    """The module with a Trainer of one process that passes for one of another strategy."""
    runner.strategy.__class__ = type(strategy.__name__, (strategy,), {})
    sizes = {"tensor_parallel": 1, "data_parallel": runner.world_size}
    runner.strategy._device_mesh = {name: SimpleNamespace(size=partial(int, n)) for name, n in sizes.items()}
    module._trainer = runner
    return module


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
@pytest.mark.parametrize(
    "make",
    [
        lambda network: NBA(network, teacher=drifted(network)),
        lambda network: FineTuning(network, latent=LatentPerturbations()),
        FST,
        D3,
        InputAwareTraining,
    ],
)
def test_what_needs_the_whole_network_refuses_shards(make, strategy, network, trainer):
    module = under(make(network), trainer(), strategy)
    match = f"keeps the whole network on each process, such as `ddp`, for {type(module).__name__}"
    with pytest.raises(ValueError, match=match):
        module.setup("fit")


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_fine_tuning_refuses_strategies_that_give_no_whole_weights(strategy, network, trainer):
    with pytest.raises(ValueError, match="Expected `strategy` to be `ddp` or ModelParallelStrategy"):
        under(FineTuning(network), trainer(), strategy).setup("fit")


def tied(network):
    network.again = network.fc
    return FineTuning(network)


def tensor_parallel(network, runner):
    module = under(FineTuning(network), runner, ModelParallelStrategy)
    runner.strategy._device_mesh["tensor_parallel"] = SimpleNamespace(size=lambda: 2)
    return module


def synchronised(network, runner):
    module = under(FineTuning(network), runner, ModelParallelStrategy)
    runner.strategy._layer_sync = TorchSyncBatchNorm()
    return module


def averaged(network, runner):
    runner.callbacks.append(EMAWeightAveraging())
    return under(FineTuning(network), runner, ModelParallelStrategy)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (tensor_parallel, "Expected `tensor_parallel_size` to be 1, and `data_parallel_size` 1, .*but got 2"),
        (synchronised, "Expected `sync_batchnorm` to be false, .*or take `ddp`"),
        (averaged, "Expected `callbacks` to be without averaging.*EMAWeightAveraging"),
        (lambda n, r: under(Classifier(n, compile=True), r, ModelParallelStrategy), "Expected `compile` to be false"),
        (
            lambda n, r: under(Classifier(n, channels_last=True), r, ModelParallelStrategy),
            "Expected `channels_last` to be none or false",
        ),
        (
            lambda n, r: under(tied(n), r, ModelParallelStrategy),
            "without tied weights.*one with 'again.weight'",
        ),
    ],
)
def test_settings_that_shards_do_not_bear_are_refused(make, match, network, trainer):
    with pytest.raises(ValueError, match=match):
        make(network, trainer()).setup("fit")


def test_only_a_strategy_that_shards_has_lightning_configure_the_model(network, trainer):
    """A class with that hook would have averaging callbacks warn under every strategy."""
    module = under(FineTuning(network), trainer(), SingleDeviceStrategy)
    module.setup("fit")
    assert not is_overridden("configure_model", module)
    assert prepare_sharding(under(module, trainer(), ModelParallelStrategy))
    assert is_overridden("configure_model", module)


def test_a_network_is_sharded_by_its_large_blocks(network):
    found = [name for name, module in network.named_modules() if module in blocks_of(network)]
    assert found == [f"block{i}.{j}" for i in (1, 2, 3) for j in (0, 1)] + ["fc"]
    transformer = nn.Sequential(
        nn.Linear(4, 8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 3)
    )
    found = [name for name, module in transformer.named_modules() if module in blocks_of(transformer)]
    assert found == ["0", "1.layers.0", "1.layers.1", "1.layers.2"]
