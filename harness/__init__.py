"""The benchmark harness: how a run happens. `harness.cli` is the command line, `harness.attached` the Python API."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.generate.attached import attached as attached

# OpenMP's threads spin while they wait, which slows them and everybody else on a busy machine. So they sleep, after a
# short spin. On an idle machine that costs time (docs/running.md). OpenMP reads this once, when torch loads; a user's
# own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["__version__", "attached"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`attached`, once it is asked for: it brings torch and transformers along."""
    if name != "attached":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("harness.generate.attached").attached
