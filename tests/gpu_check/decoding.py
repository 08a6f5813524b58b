"""Time per token of a batch at the longer prompt, as steps are run and as one captured step, beside the bytes it reads.

One prompt is prefilled for a method; a batch is copies of what was left of it.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from harness.engine.compress import Compressed
from harness.engine.decode import Decoding
from harness.engine.stepping import greedy_steps
from harness.engine.transformers_seam import AttachedModel
from harness.plan.methods import plan_method
from harness.speed.copies import copied
from harness.speed.one_method import Isolated
from tests.gpu_check.probes import BATCH_METHODS, held
from tests.gpu_check.step import Check

WARM = 2


def decoding(check: Check) -> None:
    """Steps of every batch, for the full cache, uniform slots and slots that differ by head."""
    ready = held(check.size.model, check.size.dtype, str(check.card.device))
    ids = torch.randint(
        ready.model.vocab, (check.size.lengths[1],), generator=torch.Generator().manual_seed(2)
    ).tolist()
    for method in BATCH_METHODS:
        policy = plan_method(method, revision=ready.loaded.spec.revision).policy
        runner = Isolated(ready.model, policy, check.size.budget if policy.budgeted else None)
        _batches(check, method, runner, ids)


def _batches(check: Check, method: str, runner: Isolated, ids: list[int]) -> None:
    prompts: list[Compressed] = []
    check.measure(f"{method}, prompt", lambda: prompts.append(runner.prefill(ids)))
    for batch in check.size.batches if prompts else ():
        check.measure(f"{method} x {batch}", lambda batch=batch: _steps(check, runner.model, prompts[0], batch))


def _steps(check: Check, model: AttachedModel, prompt: Compressed, batch: int) -> dict[str, Any]:
    """Milliseconds of a step that the host drives, and of one that is replayed as a graph; the bytes that it reads."""
    rows = [copied(prompt, seed=seed) for seed in range(batch)]
    with torch.inference_mode():
        made = Decoding.of(model, rows, room=2 * (check.size.steps + WARM), release=True)
        found: dict[str, Any] = {"read_bytes": _weights(model) + sum(made.nbytes(row) for row in range(batch))}
        found["held_bytes"] = check.card.held()
        found["eager_ms"] = check.card.ms(lambda: made.step([1] * batch), repeat=check.size.steps, warm=WARM)
        steps = greedy_steps(made, check.size.steps)
    captured = 1000 * median(steps.step_s) if steps.replayed else None
    found |= {"graph_ms": captured, "TBps": found["read_bytes"] / captured / 1e9 if captured else None}
    return found if captured or check.card.rehearsal else found | {"error": "its steps could not be replayed"}


def _weights(model: AttachedModel) -> int:
    """Bytes of weights that a step reads: all but a table of embeddings that is not the head's too."""
    table = model.model.get_input_embeddings().weight
    head = model.model.get_output_embeddings()
    apart = 0 if head is not None and head.weight is table else table.nbytes
    return sum(weight.nbytes for weight in model.model.parameters()) - apart
