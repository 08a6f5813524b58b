"""Time per token of a batch at the longer prompt, as steps are run and as one captured step, beside the bytes it reads.

One prompt is prefilled for a method; a batch is copies of what was left of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from harness.engine.compress import Compressed
from harness.engine.decode import Decoding
from harness.engine.transformers_seam import AttachedModel
from harness.plan.methods import plan_method
from harness.speed.copies import copied
from harness.speed.one_method import Isolated
from tests.gpu_check.card import Card
from tests.gpu_check.probes import BATCH_METHODS, held
from tests.gpu_check.step import Check, line_of

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
    """Milliseconds of a step and of a captured one, and the bytes that it reads; why it could not be captured."""
    rows = [copied(prompt, seed=seed) for seed in range(batch)]
    room = 2 * (check.size.steps + WARM) + WARM + 1  # every step has its slots, replayed ones too
    tokens = torch.ones(batch, dtype=torch.int64, device=check.card.device)
    with torch.inference_mode():
        made = Decoding.of(model, rows, room=room, release=True)
        read = _weights(model) + sum(made.nbytes(row) for row in range(batch))
        found = {"read_bytes": read, "held_bytes": check.card.held()}
        timed = partial(check.card.ms, repeat=check.size.steps, warm=WARM)
        found["eager_ms"] = timed(lambda: made.step(tokens))
        try:
            found["graph_ms"] = captured = timed(_captured(check.card, model, made))
        except RuntimeError as error:  # a step that waits for the host cannot be captured
            return found | {"graph_ms": None, "error": line_of(error)}
    return found | {"TBps": None if captured is None else read / captured / 1e9}


def _captured(card: Card, model: AttachedModel, made: Decoding) -> Callable[[], Any]:
    """What replays a step. It is always the same position's, though a replay may add a slot."""
    ids = torch.ones(made.rows, 1, dtype=torch.int64, device=card.device)
    return card.graph(lambda: model.forward(ids, made.caches, position=made.position, keep=1))


def _weights(model: AttachedModel) -> int:
    """Bytes of weights that a step reads: all but a table of embeddings that is not the head's too."""
    table = model.model.get_input_embeddings().weight
    head = model.model.get_output_embeddings()
    apart = 0 if head is not None and head.weight is table else table.nbytes
    return sum(weight.nbytes for weight in model.model.parameters()) - apart
