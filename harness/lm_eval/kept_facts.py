"""What compression did to every prompt of an lm-eval run: facts by prompt, means by task, one warning a task.

lm-eval's result file has no place for facts of a sample, so they are stored in `results["config"]` under the hash that
its samples file carries (`prompt_hash`, SHA-256 of the context's text); `harness lm-eval-import` joins the two.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from harness.engine.types import Outcome
from harness.models.prompt import token_sha256

log = logging.getLogger("harness")

STORED = (
    *("over_budget", "notes", "compressed_tokens", "budget_tokens", "kept_slots", "kv_bytes", "kv_bytes_end"),
    *("stored_bytes", "stored_bytes_end", "read_bytes"),
    *("asked_bytes", "full_bytes", "prefill_s", "compress_s"),
)
"""Fields of an outcome that are facts of its prompt."""


@dataclass
class TaskFacts:
    """Counts of one task's prompts, and what was measured on each; in the order and under the names of the results.

    kept_tokens: per layer and KV head, a mean of each prompt. notes: an ordered set.
    """

    prompts: int = 0
    uncompressed: int = 0
    truncated: int = 0
    over_budget: int = 0
    prompt_tokens: list[int] = field(default_factory=list)
    kept_tokens: list[float] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    full_bytes: list[int] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return JSON values by name: counts as they are, the mean of what was measured, notes as a list."""
        means = {name: fmean(x) if isinstance(x, list) else x for name, x in vars(self).items()}
        return means | {"notes": list(self.notes)}


class KeptFacts:
    """Collects the facts of a run. heads: KV heads of a layer. budget: as it was asked for, for messages."""

    def __init__(self, *, heads: int, budget: str) -> None:
        self.heads, self.budget = heads, budget
        self.tasks: dict[str, TaskFacts] = {}
        self.prompts: dict[str, dict[str, Any]] = {}

    def add(
        self, task: str, text: str, ids: Sequence[int], outcome: Outcome, *, compressed: bool, truncated: bool
    ) -> None:
        """Note one prompt.

        text: as lm-eval gave it. ids: what was compressed of it. compressed: False where its budget is not below it.
        """
        facts = self.tasks.setdefault(task, TaskFacts())
        facts.prompts += 1
        facts.uncompressed += not compressed
        facts.truncated += truncated
        facts.over_budget += outcome.over_budget
        facts.prompt_tokens.append(outcome.compressed_tokens)
        facts.kept_tokens.append(fmean(outcome.kept_slots) / self.heads)
        facts.kv_bytes.append(outcome.kv_bytes)
        facts.full_bytes.append(outcome.full_bytes)
        facts.notes |= dict.fromkeys(outcome.notes)
        self._warn(task, facts, outcome, compressed=compressed, truncated=truncated)
        self.prompts[hashlib.sha256(text.encode()).hexdigest()] = {  # as lm-eval hashes it for its samples file
            "prompt_sha256": token_sha256(ids),
            "compressed": compressed,
            "truncated": truncated,
            **{name: getattr(outcome, name) for name in STORED},
        }

    def means(self) -> dict[str, float | None]:
        """Return means over all prompts, which `results["config"]` shows first; None where every answer was cached."""
        found = {}
        for name in ("prompt_tokens", "kept_tokens", "kv_bytes", "full_bytes"):
            values = [x for facts in self.tasks.values() for x in getattr(facts, name)]
            found[f"kv_{name.removeprefix('kv_')}"] = fmean(values) if values else None
        return found

    def _warn(self, task: str, facts: TaskFacts, outcome: Outcome, *, compressed: bool, truncated: bool) -> None:
        line = "lm-eval task %s: %s; such prompts are counted as `%s` in the results' kv_tasks, %s"
        if not compressed and facts.uncompressed == 1:
            why = f"a context of {outcome.compressed_tokens} tokens is not above budget {self.budget}"
            advice = "lower the budget to compress them"
            log.warning(line, task, f"{why}, so it stays uncompressed", "uncompressed", advice)
        if truncated and facts.truncated == 1:
            why = "a prompt exceeds the model's context and lost tokens"
            log.warning(line, task, why, "truncated", "see max_length and truncation_side")
