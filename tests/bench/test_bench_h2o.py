"""H2O over 4096 tokens: streamed column sums against kvpress's ObservedAttention, which needs whole attention matrices.

Each side in a process of its own, because a peak is a property of a process. Twice: with the C library's heap as it
is, which keeps freed blocks, and with large blocks handed back at once, which shows what is in use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.models.assets import asset_folder

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
        command = [sys.executable, "-m", "tests.bench.h2o_peak", side, str(TOKENS), str(BUDGET), str(out)]
        given = {**os.environ, **HEAPS[heap]}
        child = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
        assert child.returncode == 0, child.stderr[-2000:]
        peaks[side], scores[side] = int(child.stdout.split()[-1]), torch.load(out)
    name = (
        f"h2o prefill, {TOKENS} tokens, float32: peak {peaks['ours'] / 2**20:.0f} / {peaks['theirs'] / 2**20:.0f} MiB"
    )
    note(name, [peaks["ours"] / peaks["theirs"]], ("<=", 0.4))
    for layer, (ours, theirs) in enumerate(zip(scores["ours"], scores["theirs"], strict=True)):
        assert ours.shape == (3, TOKENS)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=f"scores of layer {layer} differ")
