"""The page docs/architectures.md: a row for each causal language model type that transformers knows."""

import re
from collections.abc import Iterable
from pathlib import Path

import transformers
from transformers import MODEL_FOR_MASKED_LM_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.check import Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
LEFT_OUT = {
    "bert-generation": "encoders that fill masks",
    "gemma3n": "needs timm for its images; its text part is `gemma3n_text`",
    "gemma4_assistant": "drafts that read the cache of another model",
    "gemma4_unified_assistant": "drafts that read the cache of another model",
    "trocr": "decoders of an encoder",
}
HEAD = """# Architectures

Every model type that transformers {version} loads as a causal language model, and what the harness makes of it. Each
row was made by running a tiny random model of that type (`tests/architectures/check.py`); the test suite runs all of
them again, and `python -m tests.architectures --write` writes this page.

- With the full cache, the prompt in one piece or in chunks, logits and greedy answer are those of the plain model,
  alone and in a batch beside a compressed row, and the cache has the bytes of transformers' own.
- Compressed by SnapKV, every layer that policies see keeps the budget in every KV head, the other layers keep what
  they need, and the measured bytes are those of what is kept.

"Compressed" is how many layers of the tiny model policies see; the others, which have a sliding window, chunks or no
keys and values at all, [are left alone](running.md#layers-that-no-method-touches). Options of a checkpoint may change
it: where every layer has a sliding window shorter than the context, there is nothing to compress. Of a type that reads
images too, the text part runs; types whose text part transformers does not load by itself, such as `qwen2_5_vl` and
`mistral3`, have no row and are refused when they are loaded. Reasons are the harness's own messages.
"""
TABLE = """
| type | compressed | refused because |
| --- | --- | --- |
"""


def left_out(kind: str) -> str | None:
    """Why a type has no row; None if it has one."""
    if kind in LEFT_OUT:
        return LEFT_OUT[kind]
    config = CONFIG_MAPPING[kind]()
    if config.is_encoder_decoder:
        return "decoders of an encoder"
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    return "encoders that fill masks" if masked else None


def kinds() -> list[str]:
    """The types that have a row."""
    return sorted(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if left_out(kind) is None)


def row_of(row: Row) -> str:
    """A line of the table."""
    compressed = "–" if row.reason else f"{row.compressed} of {row.layers}"
    return f"| `{row.kind}` | {compressed} | {row.reason.replace('|', '/')} |"


def page(lines: Iterable[str]) -> str:
    """The whole page. lines: its rows."""
    others: dict[str, list[str]] = {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if why := left_out(kind):
            others.setdefault(why, []).append(f"`{kind}`")
    last = "".join(f"- {why}: {', '.join(own)}\n" for why, own in sorted(others.items()))
    table = "".join(f"{line}\n" for line in lines)
    return HEAD.format(version=transformers.__version__) + TABLE + table + f"\nLeft out:\n\n{last}"


def written() -> tuple[str, dict[str, str]]:
    """The version of transformers that the page is of, and its rows by type."""
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"transformers (\S+) loads", text)
    assert version is not None
    return version[1], {one[1]: one[0] for one in re.finditer(r"^\| `([^`]+)` \|.*$", text, re.M)}
