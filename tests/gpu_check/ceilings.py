"""What the card can do at most, by plain torch, and the project's own tests of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.gpu_check.step import Check

ROOT = Path(__file__).resolve().parents[2]
TESTS_S = 50.0
OUTCOME = re.compile(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
"""Of a test, as `pytest -v` prints it when it is over."""
REHEARSED = Path(__file__).with_name("rehearsed.py")
KERNEL_TESTS = ("test_triton_kernels.py", "test_ragged_rows.py", "test_gpu.py")
"""They run on the card where there is one, so they are no `gpu` tests."""


def ceilings(check: Check) -> None:
    """Memory bandwidth of a copy, and products of bfloat16 a second."""
    check.measure("copy", lambda: _copy(check))
    check.measure("product", lambda: _product(check))


def _copy(check: Check) -> dict[str, Any]:
    one = torch.ones(check.size.copied, dtype=torch.uint8, device=check.card.device)
    two = torch.empty_like(one)
    ms = check.card.ms(lambda: two.copy_(one))
    return {"ms": ms, "TBps": None if ms is None else 2 * one.nbytes / ms / 1e9}  # read once and written once


def _product(check: Check) -> dict[str, Any]:
    rows = check.size.matrix
    one, two = (torch.randn(rows, rows, device=check.card.device, dtype=torch.bfloat16) for _ in range(2))
    ms = check.card.ms(lambda: one @ two)
    return {"ms": ms, "TFLOPs": None if ms is None else 2 * rows**3 / ms / 1e9}


def own_tests(check: Check) -> None:
    """Every test that is marked `gpu`, and those of the kernels, in a process of its own."""
    if check.card.rehearsal:  # none of them is for a CPU
        check.measure("rehearsed", lambda: _pytest(check, "rehearsed", ["--noconftest", str(REHEARSED)]))
        return
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    kernels = [path for path in files if path.name in KERNEL_TESTS]
    check.measure("marked", lambda: _pytest(check, "marked", ["-m", "gpu", *map(str, marked)]))
    if kernels:
        check.measure("kernels", lambda: _pytest(check, "kernels", list(map(str, kernels))))


def _pytest(check: Check, name: str, asked: list[str]) -> dict[str, Any]:
    """Tests by outcome as far as they came, and the names of those that failed."""
    said, limit = check.out / f"tests-{name}.txt", min(TESTS_S, check.left_s())
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *asked]
    with said.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as tests:
        try:
            ended: int | str = tests.wait(limit)
        except subprocess.TimeoutExpired:
            ended = f"late: over {limit:.0f} s"
        finally:
            tests.kill()
    outcomes = OUTCOME.findall(said.read_text(encoding="utf-8", errors="replace"))
    counts = Counter(outcome for _, outcome in outcomes)
    failed = [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    return {"exit": ended, "passed": counts["PASSED"], "skipped": counts["SKIPPED"], "failed": failed}
