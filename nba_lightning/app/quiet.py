"""What other packages print and nobody can act on: silenced, line by line, for commands only; and how warnings look."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    r"Total length of `\w+` across ranks is zero",  # nothing is held out: our own sentence says so
    r"The dirpath has changed from",  # which checkpoint was the best of another folder
    r"`?\.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",  # our own sentence: app/runs.py
)
"""Beginnings of warnings, as regular expressions."""


_CHAINED = ("`Trainer.fit` stopped:", "Cleaned weights:", "Rejected weights:")
"""What ends a fit of its own, but not one of a chain, whose files are those of the chain."""


@contextmanager
def quiet(chained: bool = False, silent: bool = False) -> Iterator[None]:
    """Silence exactly these lines inside the block, and print our own warnings as notes, without a line of code.

    Args:
        chained: in a chain of fits, silence what ends a fit of its own too.
        silent: silence all that is no warning.
    """
    unwanted = _LOGGED + (_CHAINED if chained else ())

    def wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage().removeprefix("[rank: 0] ")
        return not message.startswith(unwanted) and not (silent and record.levelno <= logging.INFO)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(wanted)
    plain = warnings.formatwarning

    def as_note(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = "nba_lightning" in Path(filename).parts
        return f"Note: {message}\n" if ours else plain(message, category, filename, lineno, line)

    try:
        with warnings.catch_warnings():
            for pattern in _WARNED:
                warnings.filterwarnings("ignore", message=pattern)
            warnings.formatwarning = as_note
            yield
    finally:
        warnings.formatwarning = plain
        for logger in loggers:
            logger.removeFilter(wanted)
