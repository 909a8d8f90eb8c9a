"""Do the tests bite? Small faults put into a copy of the code one at a time; a fault that no test sees survives.

    nice -n 5 python benchmarks/mutants.py               # all, resuming; survivors are tried again
    nice -n 5 python benchmarks/mutants.py --only anp    # those with this in their name
    python benchmarks/mutants.py --list

Each mutant is a row of `mutations.py`: a name, a file of the package, a text that occurs there once,
what takes its place, and the test files that should notice. Before the first, the same tests must pass without any.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutants.jsonl"
COPIED = ("nba_lightning", "configs", "tests", "benchmarks", "pyproject.toml", "README.md")
PRELOADED = ["torch", "lightning.pytorch", "torchmetrics", "torchvision", "sklearn.datasets", "scipy", "pytest"]


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        name: what is wrong with it.
        file: where, below `nba_lightning/`.
        old: text that occurs there exactly once.
        new: what takes its place.
        tests: test files, below `tests/`, by their names without `test_` and `.py`; `processes[anp]` for the tests of
            one case.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    def path(self, root: Path = ROOT) -> Path:
        """The file that is changed."""
        return root / "nba_lightning" / self.file

    def test_paths(self) -> list[str]:
        """The test files."""
        parts = (Path(name.split("[")[0]) for name in self.tests.split())
        return [str(Path("tests") / part.parent / f"test_{part.name}.py") for part in parts]

    def arguments(self) -> list[str]:
        """What pytest is given."""
        case = self.tests.partition("[")[2].rstrip("]")
        return [*self.test_paths(), *(["-k", case] if case else [])]


MUTANTS = [Mutant(*row) for row in MUTATIONS]


def check(mutant: Mutant) -> None:
    """Raise where a mutant does not apply any more.

    Raises:
        ValueError: if its text does not occur exactly once in its file, or a test file is missing.
    """
    number = mutant.path().read_text().count(mutant.old)
    if number != 1 or mutant.old == mutant.new:
        raise ValueError(f"Expected the text of {mutant.name!r} to occur once in {mutant.file}, but got {number}.")
    missing = [path for path in mutant.test_paths() if not (ROOT / path).exists()]
    if missing:
        raise ValueError(f"Expected the tests of {mutant.name!r} to be there, but {missing} are not.")


def run_tests(folder: str, tests: list[str], first: bool) -> None:
    """In a process of its own: the tests of a copy of the tree, against the package beside them."""
    os.chdir(folder)
    os.environ.update(PYTHONPATH=folder, PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = True  # a file that changes twice a second would meet its own stale bytecode
    sys.path.insert(0, folder)
    with Path("output.txt").open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        import pytest

        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", *(["-x"] if first else [])]
        code = int(pytest.main([*options, *tests]))
        import nba_lightning

        assert str(nba_lightning.__file__).startswith(folder)
        sys.stdout.flush()
    os._exit(code)


def outcome(folder: Path, tests: list[str], timeout: float, first: bool = True) -> tuple[str, float]:
    """``survived``, ``killed`` or ``killed by time``, and the seconds that it took."""
    start = time.monotonic()
    process = multiprocessing.get_context("forkserver").Process(target=run_tests, args=(str(folder), tests, first))
    process.start()
    process.join(timeout)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    found = "killed by time" if late else "killed" if process.exitcode else "survived"
    return found, time.monotonic() - start


def known(path: Path) -> dict[str, dict[str, Any]]:
    """What was found before, by name; the last line of a name counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; how many survive is printed, and their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the name")
    parser.add_argument("--again", action="store_true", help="also those that were killed before")
    parser.add_argument("--trust", action="store_true", help="that the tests pass without any mutant")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a mutant")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if args.only in mutant.name]
    for mutant in chosen:
        check(mutant)
        if args.list:
            print(f"{mutant.name}: {mutant.file}")
    if args.list:
        return 0
    before = known(args.result)
    due = [m for m in chosen if args.again or not before.get(m.name, {}).get("outcome", "").startswith("killed")]
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        everything = sorted({path for mutant in due for path in mutant.test_paths()})
        if due and not args.trust and outcome(folder, everything, 10 * args.timeout, first=False)[0] != "survived":
            print((folder / "output.txt").read_text()[-3000:])
            raise SystemExit("The tests do not pass without any mutant.")
        for mutant in due:
            path = mutant.path(folder)
            whole = path.read_text()
            path.write_text(whole.replace(mutant.old, mutant.new))
            found, seconds = outcome(folder, mutant.arguments(), args.timeout)
            path.write_text(whole)
            row = {"name": mutant.name, "file": mutant.file, "outcome": found, "seconds": round(seconds, 1)}
            with args.result.open("a") as sink:
                sink.write(json.dumps(row) + "\n")
            print(f"{found}: {mutant.name} ({seconds:.0f} s)", flush=True)
    rows = {name: row for name, row in known(args.result).items() if name in {m.name for m in MUTANTS}}
    args.result.write_text("".join(json.dumps(rows[m.name]) + "\n" for m in MUTANTS if m.name in rows))
    survivors = [name for name, row in rows.items() if row["outcome"] == "survived"]
    print(f"{len(survivors)} of {len(rows)} survive: {', '.join(survivors) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
