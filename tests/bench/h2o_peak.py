"""Child process of `test_bench_h2o`: memory that one side's H2O prefill takes above the loaded model, and its scores.

    python -m tests.bench.h2o_peak {ours,theirs} TOKENS BUDGET OUT

Prints the bytes, and saves scores [L, H, T] to OUT. The peak is VmHWM of /proc, reset once the model has loaded and
run: `ru_maxrss` survives exec, so in a child it starts at the parent's peak.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kvpress import ObservedAttentionPress
from torch import Tensor
from transformers import DynamicCache

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.models.load import load_model
from methods.base import EvictionPolicy
from methods.registry import make_policy
from tests.bench.sides import Text, make_text, ratio


def kib(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").split("\n")
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def run_ours(model: Any, budget: int) -> Callable[[Text], list[Tensor]]:
    """Prefill with streamed column sums, then compress every layer; the scores of each."""
    engine, policy = Engine(AttachedModel(model)), make_policy("h2o@kvpress")
    assert isinstance(policy, EvictionPolicy)

    def run(text: Text) -> list[Tensor]:
        view = engine.prefill(text.ids, policy.needs).view
        with torch.inference_mode():
            kept = policy.compress(view, budget)
        assert {kv.positions.shape[2] for kv in kept} == {min(budget, len(text.ids))}
        return [layer.memo((type(policy), policy), policy.score) for layer in view.layers]

    return run


def run_theirs(model: Any, budget: int) -> Callable[[Text], list[Tensor]]:
    """Prefill with eager attention inside the press, as kvpress's pipeline does; the scores of each layer."""
    model.set_attn_implementation("eager")
    scores: list[Tensor] = []

    class Recorded(ObservedAttentionPress):  # type: ignore[misc, unused-ignore]
        def score(self, *args: Any, **kwargs: Any) -> Tensor:
            scores.append(super().score(*args, **kwargs))
            return scores[-1]

    def run(text: Text) -> list[Tensor]:
        scores.clear()
        cache = DynamicCache()
        press = Recorded(compression_ratio=ratio(budget, len(text.ids)))
        with torch.no_grad(), press(model):
            model.model(input_ids=text.tensor, past_key_values=cache)
        assert cache.get_seq_length() == budget
        return scores

    return run


def main(side: str, tokens: int, budget: int, out: str) -> None:
    torch.set_num_threads(int(os.environ.get("KVH_BENCH_THREADS", "2")))
    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    run = (run_ours if side == "ours" else run_theirs)(loaded.model, budget)
    run(make_text(loaded.tokenizer, budget + 64))  # weights paged in, kernels chosen
    text = make_text(loaded.tokenizer, tokens)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: set the peak back to the present
    before = kib("VmRSS")
    scores = run(text)
    print((kib("VmHWM") - before) * 1024)
    torch.save(torch.cat(scores), out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
