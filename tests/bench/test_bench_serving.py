"""Issue 5's ratios: decoding after compression beside `generate`, seconds of compression, a batch, peaks of prefills.

Lengths can be cut for a smoke test: KVH_BENCH_TOKENS=256 takes 256 tokens for 8192, 128 for 2048 and a budget of 32.
The goals mean something at full length only.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from harness.engine.compress import Compressed
from harness.engine.states import States
from harness.models.assets import asset_folder
from harness.records.measured import ProbeSpec
from harness.speed.client import Prober
from harness.speed.one_method import Isolated
from methods.base import KV
from methods.fullkv import FullKV
from methods.registry import make_policy

if TYPE_CHECKING:
    from tests.bench.sides import Ours, Text, Theirs

pytestmark = pytest.mark.bench
LONG = int(os.environ.get("KVH_BENCH_TOKENS", "8192"))
SHORT = 2048 if LONG == 8192 else LONG // 2
BUDGET = 128 if LONG >= 512 else 32
BATCH = 16 if LONG == 8192 else 2
NEW_TOKENS = 32
STEPS = 8
ROUNDS = 3
SELECTING = {"snapkv": 0.02, "compilerkv@window": 0.02, "compilerkv": 0.25, "h2o": 0.25}


def isolated(ours: Ours, label: str) -> Isolated:
    policy = make_policy(label).for_model(ours.loaded.spec.revision)
    return Isolated(ours.model, policy, BUDGET if policy.budgeted else None)


class Watch(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None: ...


def step_of_generate(theirs: Theirs, text: Text) -> list[float]:
    """Seconds of every token of plain `generate` after the first, which its prefill gives."""
    watch, ids = Watch(), text.tensor
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    theirs.model.generate(ids, streamer=watch, **given)
    assert len(watch.at) == NEW_TOKENS + 1  # the prompt itself comes first
    return [later - earlier for earlier, later in pairwise(watch.at[1:])]


def test_decoding_beside_generate(
    note: Callable[..., None], sides: tuple[Ours, Theirs], text: Callable[[int], Text], dtype: str
) -> None:
    """Time per output token with 128 slots, over that of `generate` with the whole cache. In turn, three times."""
    ours, theirs = sides
    theirs.model.set_attn_implementation("sdpa")
    prompt, ratios = text(LONG), dict[str, list[float]]()
    runners = {label: isolated(ours, label) for label in ("snapkv", "compilerkv")}
    for round_ in range(ROUNDS + 1):
        whole = statistics.median(step_of_generate(theirs, prompt))
        for label, runner in runners.items():
            decoded = runner.decode([runner.prefill(prompt.ids)], NEW_TOKENS)
            assert len(decoded.tokens[0]) == NEW_TOKENS
            if round_:  # the first one warms up
                ratios.setdefault(label, []).append(statistics.median(decoded.step_s) / whole)
    for label, values in ratios.items():
        note(f"TPOT, {LONG} tokens, {dtype}: {label}@{BUDGET} / generate", values, ("<=", 0.5))


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_compression_beside_prefill(
    note: Callable[..., None], sides: tuple[Ours, Theirs], text: Callable[[int], Text], tokens: int, dtype: str
) -> None:
    """Seconds of the selection; those of the observation, of windows and of sums, have a line of their own."""
    prompt, found = text(tokens), dict[str, list[Compressed]]()
    runners = {label: isolated(sides[0], label) for label in SELECTING}
    for round_ in range(ROUNDS + 1):
        for label, runner in runners.items():
            done = runner.prefill(prompt.ids)
            done.kvs.clear()
            if round_:
                found.setdefault(label, []).append(done)
    for label, goal in SELECTING.items():
        name = f"{tokens} tokens, {dtype}: {label}"
        ratios = [done.compress_s / done.prefill_s for done in found[label]]
        note(f"{name} compresses / prefills", ratios, ("<=", goal))
        note(f"{name} observes / prefills", [done.observe_s / done.prefill_s for done in found[label]])


def ready_made(ours: Ours, slots: int) -> Compressed:
    """A prompt of LONG tokens of which `slots` are left in every layer and KV head, their keys and values drawn."""
    sizes, model = ours.model.sizes(LONG), ours.model
    shape = (1, sizes.kv_heads, slots, model.config.head_dim)
    at = torch.arange(LONG - slots, LONG).expand(shape[:3])
    kvs = [KV(*(torch.randn(shape).to(model.dtype) for _ in range(2)), at) for _ in range(model.layers)]
    logits = torch.randn(1, model.vocab)
    return Compressed(FullKV(), LONG, kvs, model.compressible, logits, LONG, {LONG: States()})


def steps_of_transformers(theirs: Theirs, ours: Ours) -> list[float]:
    """Seconds of decode steps of plain transformers over a full cache of the same drawn prompts."""
    cache = DynamicCache()
    for i, kv in enumerate(ready_made(ours, LONG).kvs):
        cache.update(*(x.repeat(BATCH, 1, 1, 1) for x in (kv.keys, kv.values)), i)
    tokens, spent = torch.zeros(BATCH, 1, dtype=torch.int64), []
    with torch.inference_mode():
        for step in range(STEPS):
            start = time.perf_counter()
            at = torch.full((BATCH, 1), LONG + step)
            logits = theirs.model(tokens, past_key_values=cache, position_ids=at, use_cache=True).logits
            tokens = logits[:, -1].argmax(dim=-1, keepdim=True)
            spent.append(time.perf_counter() - start)
    return spent


def test_a_batch_beside_the_full_cache(note: Callable[..., None], sides: tuple[Ours, Theirs], dtype: str) -> None:
    """Output tokens a second of prompts decoded together, on ready-made caches: ours, ours in full, transformers."""
    ours, theirs = sides
    theirs.model.set_attn_implementation("sdpa")
    found = {}
    for slots in (BUDGET, LONG):
        done = isolated(ours, "fullkv").decode([ready_made(ours, slots) for _ in range(BATCH)], STEPS + 1)
        found[slots] = statistics.median(done.step_s[1:])
    plain = statistics.median(steps_of_transformers(theirs, ours)[1:])
    name = f"batch {BATCH}, {LONG} tokens, {dtype}: {BUDGET} slots /"
    note(f"{name} full cache of ours, tokens/s", [found[LONG] / found[BUDGET]], (">=", 15))
    note(f"{name} full cache of transformers, tokens/s", [plain / found[BUDGET]], (">=", 15))


@pytest.mark.parametrize("label", ["h2o", "compilerkv"])
def test_the_peak_of_a_prefill(note: Callable[..., None], label: str, dtype: str) -> None:
    """Memory above the model of a prefill and one decoded token, over that of the full cache; each by itself."""
    if not asset_folder("smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not in the cache; run `harness fetch smollm2-135m`")
    peaks = []
    with Prober(model="smollm2-135m", dtype=dtype, device="cpu", threads=torch.get_num_threads()) as prober:
        for method, budget in (("fullkv", None), (label, str(BUDGET))):
            spec = ProbeSpec(method=method, budget=budget, tokens=LONG, new_tokens=2, warm_up=False)
            result = prober.ask(spec, timeout_s=3000.0)
            assert result.measured is not None, result.error
            peaks.append(result.measured.peak_bytes)
    full, kept = peaks
    name = f"peak, {LONG} tokens, {dtype}: {label} / fullkv"
    note(name, [kept / full], ("<=", 1.15))
