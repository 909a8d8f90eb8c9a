import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nba_lightning.io.weights import load_weights, read_state_dict, save_weights


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.module.", "_orig_mod.encoder."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_prefixes_and_nesting(net, tmp_path, prefix, nest, suffix):
    state = {prefix + name: value + 1 for name, value in net.state_dict().items()}
    content = state if nest is None else {nest: state, "epoch": 3}
    torch.save(content, tmp_path / f"w{suffix}")
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    load_weights(other, tmp_path / f"w{suffix}")
    expected = [value + 1 for value in net.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), expected, strict=True))


def test_the_student_is_taken_from_a_checkpoint_with_a_teacher(net, tmp_path):
    state = {f"model.{k}": v + 1 for k, v in net.state_dict().items()}
    state |= {f"teacher.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    before = net[0].weight.clone()
    load_weights(net, tmp_path / "w.ckpt")
    torch.testing.assert_close(net[0].weight, before + 1)


def test_safetensors_round_trip_keeps_keys_and_dtypes(net, tmp_path):
    dtypes = {name: value.dtype for name, value in net.state_dict().items()}
    save_weights(net.double().state_dict(), tmp_path / "deep" / "w.safetensors", dtypes)
    assert {name: value.dtype for name, value in load_file(tmp_path / "deep" / "w.safetensors").items()} == dtypes
    load_weights(net.float(), tmp_path / "deep" / "w.safetensors")


def test_weights_that_do_not_fit_list_the_first_keys(net, tmp_path):
    save_file(
        {"0.weight": torch.zeros(4, 1, 3, 3), "0.bias": torch.zeros(2), "head.weight": torch.zeros(1)},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(
        ValueError,
        match=r"missing: 1.weight, 1.bias.*unexpected: head.weight.*wrong shape: 0.weight "
        r"\(4, 1, 3, 3\) instead of \(2, 1, 3, 3\)",
    ):
        load_weights(net, tmp_path / "w.safetensors")


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": {}, "x": Bomb(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"could run a stranger's code. Ask its author"):
        read_state_dict(tmp_path / "w.pt")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match="old.pth"):
        read_state_dict(tmp_path / "old.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 400])
def test_truncated_files_are_named(net, tmp_path, suffix, keep):
    path = tmp_path / f"w{suffix}"
    save_file(net.state_dict(), path) if suffix == ".safetensors" else torch.save(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"w{suffix}' is (truncated, )?corrupt"):
        read_state_dict(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected `weights` to be an existing file"):
        read_state_dict(tmp_path / "missing.pt")
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="Expected `weights` to end in"):
        read_state_dict(tmp_path / "w.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="to hold a state dict, but got list"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="found no tensors; its keys are epoch"):
        read_state_dict(tmp_path / "none.pt")
