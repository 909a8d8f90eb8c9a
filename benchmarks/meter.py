"""What a fit costs: passes through networks, seconds, peak memory."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nba_lightning import Classifier


class Meter(Callback):
    """Figures of the code under :func:`metered`; as a callback of its Trainer, of the fit before a checkpoint too."""

    def __init__(self) -> None:
        self.passes, self.seconds, self.peak_memory_mib, self.finite = 0, 0.0, 0.0, True
        self._memory, self._start = _reset_peak(), time.perf_counter()

    def read(self) -> None:
        """Bring seconds and peak memory up to date."""
        self.seconds = round(time.perf_counter() - self._start, 1)
        self.peak_memory_mib = max(self.peak_memory_mib, round(_peak() - self._memory, 1))

    def state_dict(self) -> dict[str, Any]:
        """What the fit has cost so far."""
        self.read()
        return {"passes": self.passes, "seconds": self.seconds, "peak_memory_mib": self.peak_memory_mib}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.passes, self.peak_memory_mib = state_dict["passes"], state_dict["peak_memory_mib"]
        self._start = time.perf_counter() - state_dict["seconds"]


@contextmanager
def metered(module: Classifier) -> Iterator[Meter]:
    """Count the images that pass forwards or backwards through the module's network or any that is frozen beside it.

    Peak memory is what the fit needs on top of what was there before it: of the device, or of the process.
    """
    meter = Meter()

    def backward(gradient: Tensor) -> None:
        meter.passes += len(gradient)

    def forward(_: Any, inputs: Any, logits: Tensor) -> None:
        meter.passes += len(inputs[0])
        if logits.requires_grad:
            logits.register_hook(backward)

    hooks = [network.register_forward_hook(forward) for network in module.networks()]
    try:
        yield meter
    finally:
        meter.read()
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


def process_memory() -> float:
    """Memory of this process now (MiB)."""
    return _process("VmRSS")


def _process(field: str) -> float:
    """A field of the process's status (MiB); nan where the system has none."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
    return float("nan")
