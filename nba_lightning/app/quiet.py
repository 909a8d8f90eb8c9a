"""What other packages print at start-up and nobody can act on: silenced, line by line, for the command line only."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGED = (
    "Seed set to",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "LOCAL_RANK:",
    "You are using a CUDA device",  # advice on matmul precision
    "\U0001f4a1 Tip:",  # advertises other products of Lightning
    "Loading `train_dataloader` to estimate",
    "Running in `fast_dev_run` mode",
    "\nDetected KeyboardInterrupt",  # our own sentence follows
)
"""Beginnings of Lightning's log lines."""
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.accelerators.cuda",
)
_WARNED = (
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # epochs are logged anyway
    r"The '\w+' does not have many workers",  # sets in memory need none
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the teacher is; ours say what trains
    r"Checkpoint directory .* exists and is not empty",  # refused or resumed: see app/runs.py
    r"The dirpath has changed from",  # which checkpoint was the best of another folder
    r"`?\.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",  # our own sentence: app/runs.py
)
"""Beginnings of warnings, as regular expressions."""


def _wanted(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not message.removeprefix("[rank: 0] ").startswith(_LOGGED)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exactly these lines inside the block."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_wanted)
    try:
        with warnings.catch_warnings():
            for pattern in _WARNED:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_wanted)
