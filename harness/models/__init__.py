"""Models and their text: found by name, read from any format, prompts turned into tokens, assets fetched.

Others call `load_model`, `prompt.TaskTokenizer` and `assets.fetch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.models.load import load_model as load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`load_model`, once it is asked for: it brings torch and transformers along."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("harness.models.load").load_model
