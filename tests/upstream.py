"""What the comparisons with lm-eval share: its task files, and a tokenizer for both sides."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

FOLDER = Path(next(iter(find_spec("lm_eval").submodule_search_locations)), "tasks")  # type: ignore[union-attr,arg-type]


class Functions(yaml.SafeLoader):
    """Reads `!function module.name` as that text."""


Functions.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


class Chars:
    """A token is four characters, of any text. Called, it is what lm-eval expects of a tokenizer."""

    template_tokens = 8

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        parts = (text[i : i + 4] for i in range(0, len(text), 4))
        return [self._known.setdefault(part, len(self._known)) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        known = list(self._known)
        return "".join(known[i] for i in ids)

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.encode(text))


def task_file(family: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = Functions((FOLDER / family / f"{name}.yaml").read_text(encoding="utf-8")).get_data()
    return content
