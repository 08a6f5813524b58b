"""H2O over 4096 tokens: streamed column sums against kvpress's ObservedAttention, which needs whole attention matrices.

Each side in a process of its own, because a peak is a property of a process: this module as a command prints the bytes
above the loaded model and saves scores [L, H, T]. The peak is VmHWM, reset once the model has loaded and run, for
`ru_maxrss` survives exec. Twice: with the C library's heap as it is, which keeps freed blocks, and with large blocks
handed back at once, which shows what is in use.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.models.assets import asset_folder
from harness.models.load import load_model
from harness.speed import memory_limit
from methods.base import EvictionPolicy
from methods.registry import make_policy

pytestmark = pytest.mark.bench
ROOT = Path(__file__).resolve().parents[2]
TOKENS, BUDGET = 4096, 128
HEAPS = {"heap as it is": {}, "freed at once": {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is reset through Linux's /proc")
@pytest.mark.parametrize("heap", HEAPS)
def test_peak_memory_and_scores(note: Callable[..., None], tmp_path: Path, heap: str) -> None:
    if not asset_folder("smollm2-135m").is_dir() or not asset_folder("essays").is_dir():
        pytest.skip("the packaged assets are not in the cache")
    peaks, scores = {}, {}
    for side in ("ours", "theirs"):
        out = tmp_path / f"{side}.pt"
        command = [sys.executable, "-m", "tests.bench.test_bench_h2o", side, str(out)]
        given = {**os.environ, **HEAPS[heap]}
        child = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
        assert child.returncode == 0, child.stderr[-2000:]
        peaks[side], scores[side] = int(child.stdout.split()[-1]), torch.load(out)
    note(
        f"h2o prefill, {TOKENS} tokens, float32, {heap}: peak, ours / kvpress",
        [peaks["ours"] / peaks["theirs"]],
        ("<=", 0.4),
    )
    for layer, (ours, theirs) in enumerate(zip(scores["ours"], scores["theirs"], strict=True)):
        assert ours.shape == (3, TOKENS)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=f"scores of layer {layer} differ")


def run_ours(model: Any, ids: list[int]) -> list[Tensor]:
    """Prefill with streamed column sums, then compress every layer; the scores of each."""
    policy = make_policy("h2o@kvpress")
    assert isinstance(policy, EvictionPolicy)
    view = Engine(AttachedModel(model)).prefill(ids, policy.needs).view
    with torch.inference_mode():
        kept = policy.compress(view, BUDGET)
    assert {kv.positions.shape[2] for kv in kept} == {BUDGET}
    return [layer.memo((type(policy), policy), policy.score) for layer in view.layers]


def run_theirs(model: Any, ids: list[int]) -> list[Tensor]:
    """Prefill with eager attention inside the press, as kvpress's pipeline does; the scores of each layer."""
    from kvpress import ObservedAttentionPress
    from transformers import DynamicCache

    from tests.bench.sides import ratio

    model.set_attn_implementation("eager")
    scores: list[Tensor] = []

    class Recorded(ObservedAttentionPress):  # type: ignore[misc, unused-ignore]
        def score(self, *args: Any, **kwargs: Any) -> Tensor:
            scores.append(super().score(*args, **kwargs))
            return scores[-1]

    cache, press = DynamicCache(), Recorded(compression_ratio=ratio(BUDGET, len(ids)))
    with torch.no_grad(), press(model):
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    assert cache.get_seq_length() == BUDGET
    return scores


def main(side: str, out: str) -> None:
    from tests.bench.sides import make_text

    torch.set_num_threads(int(os.environ.get("KVH_BENCH_THREADS", "2")))
    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    run = run_ours if side == "ours" else run_theirs
    run(loaded.model, make_text(loaded.tokenizer, BUDGET + 64).ids)  # weights paged in, kernels chosen
    text = make_text(loaded.tokenizer, TOKENS)
    gc.collect()
    assert memory_limit.reset_peak()
    before = memory_limit.status_bytes("VmRSS")
    scores = run(loaded.model, text.ids)
    print(memory_limit.peak_bytes() - before)
    torch.save(torch.cat(scores), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
