"""The faults that the tests are tried with still apply to the code; `benchmarks/mutants.py` tries them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("mutants")
    for name in ("mutants", "mutations"):
        sys.modules.pop(name)


def test_every_mutant_applies_once_and_has_a_name_of_its_own(mutants):
    for mutant in mutants.MUTANTS:
        mutants.check(mutant)
        compile(mutant.path().read_text().replace(mutant.old, mutant.new), mutant.file, "exec")
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names) >= 60


def test_a_mutant_that_does_not_apply_is_named(mutants):
    mutant = mutants.MUTANTS[0]
    with pytest.raises(ValueError, match="to occur once in defenses/anp.py, but got 0"):
        mutants.check(mutant._replace(old="no such text"))
    with pytest.raises(ValueError, match="to occur once in defenses/anp.py, but got 1"):
        mutants.check(mutant._replace(new=mutant.old))
    with pytest.raises(ValueError, match=r"\['tests/test_none.py'\] are not"):
        mutants.check(mutant._replace(tests="none"))


def test_the_published_number_is_that_of_the_results(mutants):
    rows = [json.loads(line) for line in mutants.RESULT.read_text().splitlines()]
    assert {row["name"] for row in rows} <= {mutant.name for mutant in mutants.MUTANTS}
    survivors = [row["name"] for row in rows if row["outcome"] == "survived"]
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"**{len(survivors)} of {len(rows)}** survive" in text
    assert all(f"`{name}`" in text for name in survivors)
