import argparse
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nba_lightning.io.checkpoints import SafeCheckpointIO
from nba_lightning.io.weights import load_weights, read_state_dict, save_weights, split_location


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
    with pytest.warns(UserWarning, match=r"'state_dict.model' is taken. .*weights='file.pth#state_dict.teacher'"):
        load_weights(net, tmp_path / "w.ckpt")
    torch.testing.assert_close(net[0].weight, before + 1)
    load_weights(net, f"{tmp_path / 'w.ckpt'}#state_dict.teacher")
    torch.testing.assert_close(net[0].weight, before)


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


def test_of_a_folder_it_is_said_what_to_name(net, tmp_path):
    with pytest.raises(ValueError, match=r"Expected `weights` to be a file, but got the folder '.*'\.$"):
        read_state_dict(tmp_path)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Name a file in it: model\.safetensors\.$"):
        read_state_dict(tmp_path)
    (tmp_path / ".metadata").touch()  # as torch.distributed.checkpoint writes it
    with pytest.raises(ValueError, match="a sharded checkpoint. Write it as one file with `python -m lightning"):
        read_state_dict(tmp_path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected `weights` to be an existing file"):
        read_state_dict(tmp_path / "missing.pt")
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="w.bin' is truncated, corrupt or no PyTorch or safetensors file"):
        read_state_dict(tmp_path / "w.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="to hold a state dict, but got list"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="found no tensors; its keys are epoch"):
        read_state_dict(tmp_path / "none.pt")


def filled(network, value):
    return {name: torch.full_like(tensor, value) for name, tensor in network.state_dict().items()}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


AMBIGUOUS = {
    "momentum": lambda a, b: {"state_dict": under("encoder_q.", a) | under("encoder_k.", b)},
    "unequal": lambda a, b: under("ema.", a) | under("classifier.", b),
    "timm": lambda a, b: {"state_dict": a, "state_dict_ema": b, "epoch": 3},
    "torchvision": lambda a, b: {"model": a, "model_ema": {"n_averaged": torch.tensor(1)} | under("module.", b)},
    "top": lambda a, b: a | under("ema.", b),
}


@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_one_of_several_copies_is_never_chosen(net, tmp_path, layout):
    torch.save(AMBIGUOUS[layout](filled(net, 1), filled(net, 2)), tmp_path / "two.pth")
    names = {
        "momentum": ("state_dict.encoder_q", "state_dict.encoder_k"),
        "unequal": ("ema", "classifier"),
        "timm": ("state_dict", "state_dict_ema"),
        "torchvision": ("model", "model_ema"),
        "top": ("", "ema"),
    }[layout]
    with pytest.raises(ValueError, match="hold one copy of the network, but got different ones under") as refusal:
        load_weights(net, tmp_path / "two.pth")
    for number, name in enumerate(names, start=1):
        assert f"'{name}" in str(refusal.value)
        load_weights(net, f"{tmp_path}/two.pth#{name}")
        assert same(net, _with(filled(net, number)))
    with pytest.raises(ValueError, match="a file with a Sequential under 'encoder', but got no such names"):
        load_weights(net, f"{tmp_path}/two.pth#encoder")


def _with(state):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_copies_that_are_equal_are_one(net, tmp_path, layout):
    torch.save(AMBIGUOUS[layout](filled(net, 2), filled(net, 2)), tmp_path / "two.pth")
    load_weights(net, tmp_path / "two.pth")
    assert same(net, _with(filled(net, 2)))


def test_averaged_weights_of_lightning_are_told(net, tmp_path):
    content = {"state_dict": filled(net, 2), "current_model_state": filled(net, 1), "averaging_state": {}}
    torch.save({key: under("model.", state) for key, state in content.items()}, tmp_path / "w.ckpt")
    with pytest.warns(UserWarning, match=r"'state_dict.model' is taken.*w?#current_model_state.model"):
        load_weights(net, tmp_path / "w.ckpt")
    assert same(net, _with(filled(net, 2)))


def test_averages_of_the_parameters_alone_are_told(net, tmp_path):
    shadow = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    torch.save({"model": filled(net, 1), "ema": {"shadow": shadow}}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"without the buffers, under 'ema.shadow.'; those under 'model' are taken"):
        load_weights(net, tmp_path / "w.pth")
    assert same(net, _with(filled(net, 1)))


@pytest.mark.filterwarnings("error")
def test_other_layers_and_optimisers_are_no_copies(net, tmp_path):
    wide = nn.Sequential(net, nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.rand(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    state = {f"0.{name}": value for name, value in filled(net, 3).items()} | {
        name: value for name, value in wide.state_dict().items() if name.startswith("1.")
    }
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "w.pth")
    load_weights(net, tmp_path / "w.pth")
    assert same(net, _with(filled(net, 3)))


def test_a_hash_in_the_name_of_a_file_is_no_mark(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "run#1.pth")
    load_weights(net, tmp_path / "run#1.pth")
    assert split_location(tmp_path / "run#1.pth#model") == (tmp_path / "run#1.pth", "model")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "name", ["model_last.th", "best.pth.tar", "x.tar", "pytorch_model.bin", "M.PTH", "w", "w.safetensors"]
)
def test_the_content_decides_not_the_suffix(net, tmp_path, name, legacy):
    torch.save({"state_dict": filled(net, 3)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    load_weights(net, tmp_path / name)
    assert same(net, _with(filled(net, 3)))
    save_file(filled(net, 4), tmp_path / name)
    load_weights(net, tmp_path / name)
    assert same(net, _with(filled(net, 4)))


@pytest.mark.parametrize(
    "beside", [np.float64(0.9), np.float32(0.9), np.int64(3), np.bool_(True), argparse.Namespace(a=1)]
)
def test_numbers_and_arguments_beside_the_weights_are_harmless(net, tmp_path, beside):
    torch.save({"state_dict": filled(net, 3), "best": beside}, tmp_path / "w.pth")
    allowed = set(torch.serialization.get_safe_globals())
    load_weights(net, tmp_path / "w.pth")
    assert same(net, _with(filled(net, 3)))
    assert set(torch.serialization.get_safe_globals()) == allowed  # nothing stays allowed for others


def test_numbers_of_an_older_numpy_are_read(net, tmp_path):
    torch.save(
        {"state_dict": filled(net, 3), "best": np.float64(1)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False
    )
    old = (tmp_path / "w.pth").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "w.pth").write_bytes(old)
    load_weights(net, tmp_path / "w.pth")


def test_code_in_a_namespace_is_refused(tmp_path):
    torch.save({"args": argparse.Namespace(a=Bomb(tmp_path / "ran"))}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="could run a stranger's code"):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def _zip(*names):
    with zipfile.ZipFile(found := io.BytesIO(), "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return found.getvalue()


def _tar(*names):
    with tarfile.open(fileobj=(found := io.BytesIO()), mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return found.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "a Keras .HDF5. file"),
        (b"\x08\x09\x12\x07pytorch" + bytes(40), "an ONNX model"),
        (_zip("m/data.pkl", "m/constants.pkl"), "a TorchScript program"),
        (_zip("m/archive_format", "m/models/model.json"), "a program of `torch.export`"),
        (_zip("config.json", "model.weights.h5"), "a Keras file"),
        (_zip("weights.pth"), "a zip archive that PyTorch did not write: unpack it"),
        (_tar("weights.pth", "readme"), "a tar archive of 2 entries: unpack it"),
        (_tar("pickle", "storages", "tensors"), "in PyTorch's tar format of before 2017"),
        (b"\x1f\x8b" + bytes(40), "compressed .gzip.: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, kind):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"w.pth' is {kind}"):
        read_state_dict(tmp_path / "w.pth")


def test_weights_that_are_not_finite_are_named(net, tmp_path):
    state = net.state_dict()
    state["0.bias"] = torch.tensor([0.0, float("nan")])
    state["1.running_var"] = torch.tensor([float("inf"), 1.0])
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="to be finite as float32, but got NaN or infinity in: 0.bias, 1.running_var"):
        load_weights(net, tmp_path / "w.pth")
    torch.save(filled(net, 1e6), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="finite as float16, but got NaN or infinity in: 0.weight"):
        load_weights(net.half(), tmp_path / "w.pth")


def test_an_infinite_buffer_of_the_network_itself_is_right(tmp_path):
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    save_weights(network.state_dict(), tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    save_weights(network.state_dict() | {"mask": torch.full((2,), -float("inf"))}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="infinity in: mask"):
        load_weights(network, tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_codes_of_a_quantisation_are_no_values(net, tmp_path, dtype):
    torch.save(net.state_dict() | {"0.weight": torch.ones(2, 1, 3, 3).to(dtype)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"quantised or other ones in: 0.weight \({dtype} for torch.float32\)"):
        load_weights(net, tmp_path / "w.pth")


def test_quantised_tensors_are_no_values(net, tmp_path):
    weight = torch.quantize_per_tensor(torch.ones(2, 1, 3, 3), 0.1, 0, torch.qint8)
    torch.save(net.state_dict() | {"0.weight": weight}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="quantised"):
        load_weights(net, tmp_path / "w.pth")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken_where_nothing_is_lost(net, tmp_path, dtype):
    wanted = {name: value.to(dtype).to(value.dtype) for name, value in net.state_dict().items()}
    torch.save({name: value.to(dtype) for name, value in wanted.items()}, tmp_path / "w.pth")
    load_weights(net, tmp_path / "w.pth")
    assert same(net, _with(wanted))


def test_rounded_weights_are_told(net, tmp_path):
    torch.save(net.state_dict() | {"0.bias": torch.tensor([0.1, 0.5], dtype=torch.float64)}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="rounded to the network's float32, in which they are not exact: 0.bias"):
        load_weights(net, tmp_path / "w.pth")
    torch.save(net.state_dict() | {"1.num_batches_tracked": torch.tensor(0.5)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"1.num_batches_tracked \(torch.float32 for torch.int64\)"):
        load_weights(net, tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_a_disk_that_is_full_while_writing_leaves_the_file_of_before(kind, tmp_path, monkeypatch):
    """Lightning copies a checkpoint over the old one where its temporary folder is on another disk."""
    path, tensors = tmp_path / "new" / "w", {"w": torch.ones(3)}
    write = {"weights": save_weights, "checkpoint": SafeCheckpointIO().save_checkpoint}[kind]
    write(tensors, path)
    before = path.read_bytes()

    def full(content, where, *args, **kwargs):
        Path(where).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", lambda where, content: full(content, where))
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", full)
    with pytest.raises(OSError, match="No space left"):
        write(tensors, path)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["w"]


def test_written_weights_may_be_read_by_whoever_may_read_other_files(tmp_path):
    save_weights({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
