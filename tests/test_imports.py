import json
import sys

from tests.helpers import run_script

NOTED = """
import builtins, json, sys
asked, own = set(), builtins.__import__

def noted(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and (globals or {}).get("__name__", "").partition(".")[0] == "nba_lightning":
        asked.add(name.partition(".")[0])
    return own(name, globals, locals, fromlist, level)

for name in [name for name in sys.modules if name.partition(".")[0] == "nba_lightning"]:
    del sys.modules[name]  # what starting this process has imported of ours
builtins.__import__ = noted
import nba_lightning
builtins.__import__ = own
ours = [name for name in sys.modules if name.partition(".")[0] == "nba_lightning"]
print(json.dumps([sorted(asked - set(sys.stdlib_module_names)), ours, "timm" in sys.modules, "jinja2" in sys.modules]))
"""
LIGHTNINGS_OWN = {"lightning", "torch", "torchmetrics", "numpy", "rich"}
"""What Lightning imports itself, so that it costs nothing more."""


def test_importing_the_package_asks_for_little_beside_lightning(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(NOTED)
    ran = run_script([sys.executable, str(script)])
    assert ran.returncode == 0, ran.stderr
    asked, ours, *heavy = json.loads(ran.stdout)
    assert "torch" in asked
    assert set(asked) <= LIGHTNINGS_OWN | {"nba_lightning", "torchvision", "safetensors", "PIL"}
    assert heavy == [False, False]
    # The commands, the scans and the report come when they are asked for.
    assert not [name for name in ours if name.startswith(("nba_lightning.app", "nba_lightning.scan"))]
