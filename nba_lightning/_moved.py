"""Where modules were before the folders of today: old imports and class paths in YAML go on working, with a warning."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "adapters": "io.adapters",
    "augmentation": "core.augmentation",
    "checkpoints": "io.checkpoints",
    "cli": "app.cli",
    "demo": "app.demo",
    "features": "core.features",
    "functional": "core.functional",
    "metrics": "core.metrics",
    "modules": "",
    "weights": "io.weights",
}
"""Public modules of version 0.1 and what they are now, below ``nba_lightning``; ``""`` is the package itself."""


class MovedModules(MetaPathFinder, Loader):
    """Finds the old names of :data:`MOVED`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for an old name, none for any other."""
        package, _, rest = name.partition(".")
        return ModuleSpec(name, self) if package == "nba_lightning" and rest in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that it is now."""
        package, _, old = spec.name.partition(".")
        new = ".".join(part for part in (package, MOVED[old]) if part)
        warnings.warn(f"`{spec.name}` is `{new}` now.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        alias = ModuleType(spec.name, module.__doc__)
        alias.__dict__.update({key: value for key, value in vars(module).items() if not key.startswith("__")})
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def install() -> None:
    """Let old names be found."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
