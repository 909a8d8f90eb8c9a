"""What a fit costs: passes through networks, seconds, peak memory."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Meter:
    """Figures of the code under :func:`metered`."""

    passes = 0
    seconds = 0.0
    peak_memory_mib = 0.0


@contextmanager
def metered(module: nn.Module, network: type[nn.Module]) -> Iterator[Meter]:
    """Count the images that pass forwards or backwards through any network of class ``network`` inside ``module``.

    Peak memory is what the fit needs on top of what was there before it: of the device, or of the process.
    """
    meter = Meter()

    def backward(gradient: Tensor) -> None:
        meter.passes += len(gradient)

    def forward(_: nn.Module, inputs: Any, logits: Tensor) -> None:
        meter.passes += len(inputs[0])
        if logits.requires_grad:
            logits.register_hook(backward)

    hooks = [inner.register_forward_hook(forward) for inner in module.modules() if type(inner) is network]
    before, start = _reset_peak(), time.perf_counter()
    try:
        yield meter
    finally:
        meter.seconds = round(time.perf_counter() - start, 1)
        meter.peak_memory_mib = round(_peak() - before, 1)
        for hook in hooks:
            hook.remove()


def _reset_peak() -> float:
    """Memory in use (MiB), from where the peak is counted."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory of earlier cells back
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    return _process("VmRSS")


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _process("VmHWM")


def _process(field: str) -> float:
    """A field of the process's status (MiB); nan where the system has none."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
    return float("nan")
