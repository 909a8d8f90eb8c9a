"""Calling the scripts of ``benchmarks/`` within the process of the tests, which spares starting Python each time."""

import importlib
import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))  # last, so that no name of a benchmark hides a package's


class Ran(NamedTuple):
    """What a script did."""

    returncode: int
    stdout: str
    stderr: str


def call(script, *arguments):
    """Run ``main`` of a script as its command line would."""
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", [f"{script}.py", *map(str, arguments)]),
        patch.dict(os.environ),
    ):
        try:
            importlib.import_module(script).main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print("" if isinstance(end.code, int) else end.code, file=err)
    return Ran(status, out.getvalue(), err.getvalue())
