"""The benchmark harness: how a run happens. `harness.cli` is the command line, `harness.attached` the Python API."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.generate.attached import attached as attached

# OpenMP's threads spin while they wait, which makes them 20 to 50 times slower beside other work. It reads this once,
# when torch loads; a user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["__version__", "attached"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`attached`, once it is asked for: it brings torch and transformers along."""
    if name != "attached":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("harness.generate.attached").attached
