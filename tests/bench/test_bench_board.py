"""From stored records to a board; goal: a million records in under 60 seconds and 2 GB, linear in their number.

The records are made: those of a pretend night on 10,000 samples (RULER at two lengths, LongBench in contexts of two
questions, NIAH), 96 methods and budgets and fullkv, of the size and with all the fields that a run writes. Each size is
measured in a process of its own, from the folder to the tables.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.records.record import Record
from harness.records.spec import SCHEMA_VERSION
from leaderboards.stats.grid import Grid
from leaderboards.stats.subject import compare
from leaderboards.stats.summaries import ENGLISH, RULER
from tests.leaderboards.stats.test_subject import scored
from tests.pretend import manifest, record

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]
BUDGETS = ("64", "128", "256", "512", "1024", "0.25")
METHODS = ("compilerkv", "snapkv", "h2o", *(f"method{i}" for i in range(13)))
CELLS = [("fullkv", "full"), *((m, b) for b in BUDGETS for m in METHODS)]
TASKS = [
    *(f"ruler/{name}" for name in sorted(RULER)),
    *(f"longbench/{name}" for names in ENGLISH.values() for name in names),
    "niah/passkey",
]
LAYERS, HEADS = 30, 3
MEASURE = """
import resource, sys, time
from pathlib import Path
from harness.records.run_folder import find_runs, load_board_records
from leaderboards.stats.aggregate import aggregate
begin = time.perf_counter()
runs = [load_board_records(folder) for folder in find_runs(Path(sys.argv[1]))]
loaded = time.perf_counter()
tables = aggregate([r for _, stored in runs for r in stored], manifests=[m for m, _ in runs], subject="compilerkv")
end = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(sum(len(stored) for _, stored in runs), len(tables[0].rows), loaded - begin, end - loaded, peak)
"""


def of_sample(i: int, generator: random.Random) -> dict[str, Any]:
    """What all cells of a sample share."""
    task = TASKS[i % len(TASKS)]
    place = i // len(TASKS)
    meta: dict[str, Any] = {"group": f"context {place}"}
    if task.startswith("longbench/"):
        meta = {"group": f"context {place // 2}", "length": generator.randrange(8000)}
    elif task.startswith("ruler/"):
        meta |= {"length": (4096, 8192)[place % 2], "depth": generator.randrange(101), "needles": ["a needle " * 8]}
    else:
        meta |= {"length": 4096, "depth": generator.randrange(101)}
    return {
        **{"task": task, "sample_id": f"{meta['length']}/{place}", "meta": meta, "answers": ["6266715"]},
        **{"prompt_tokens": 4000, "compressed_tokens": 4000, "prompt_sha256": f"{i:064x}"},
        "needle_tokens": 23 if "needles" in meta else 0,
    }


def line(sample: dict[str, Any], cell: tuple[str, str], generator: random.Random) -> str:
    """One record; one in 20,000 ran out of memory."""
    strength = 0.3 + (CELLS.index(cell) % 16) / 40
    ok = generator.random() > 1 / 20_000
    layers = LAYERS if sample["needle_tokens"] else 0
    own = {
        **{"status": "ok" if ok else "oom", "error": None if ok else "out of memory", "decode_rows": 32},
        **{"budget_tokens": 128, "kept_slots": [generator.randrange(100, 999) for _ in range(LAYERS)]},
        **{"kv_bytes": 1474560, "kv_bytes_end": 1681920, "prediction": " 6266715.", "nll_tokens": 8},
        "needle_kept": [[generator.randrange(24) for _ in range(HEADS)] for _ in range(layers)],
        "token_ids": [generator.randrange(49152) for _ in range(9)],
        "metrics": {"score": float(generator.random() < strength)} if ok else {},
        "nll": generator.random() + 1 - strength if ok else None,
        **{name: generator.random() for name in ("prefill_s", "compress_s", "decode_s")},
    }
    return json.dumps({**TEMPLATE, **sample, "method": cell[0], "budget": cell[1], **own}, separators=(",", ":"))


TEMPLATE = record("", "", "", 0.0, run_id=manifest().run_id).model_dump(mode="json")


def make(folder: Path, records: int) -> None:
    """A run folder of so many records."""
    folder.mkdir()
    (folder / "run.json").write_text(manifest().model_dump_json())
    generator = random.Random(0)
    with (folder / "records.jsonl").open("w") as file:
        for i in range(-(-records // len(CELLS))):
            sample = of_sample(i, generator)
            some = CELLS[: records - i * len(CELLS)]
            file.writelines(line(sample, cell, generator) + "\n" for cell in some)


def measured(folder: Path) -> list[float]:
    """Records, rows, seconds to load, seconds to aggregate, and the most bytes that were held."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [float(word) for word in done.stdout.split()]


def test_a_million_records(tmp_path: Path, note: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {}
    for records in (100_000, 1_000_000):
        folder = tmp_path / str(records)
        make(folder, records)
        first = (folder / "records.jsonl").open().readline()
        assert Record.model_validate_json(first).model_dump(mode="json") == json.loads(first)
        assert json.loads(first)["schema_version"] == SCHEMA_VERSION
        found, rows, load, work, peak = measured(folder)
        shutil.rmtree(folder)
        assert (found, rows) == (records, len(CELLS))
        seconds[records] = load + work
        with capsys.disabled():
            print(
                f"\n{records} records: {load:.1f} s to read, {work:.1f} s to aggregate, "
                f"{records / (load + work):.0f} records/s, peak {peak / 1e9:.2f} GB"
            )
        if records == 1_000_000:
            note("board of 1,000,000 records: seconds", [load + work], ("<=", 60))
            note("board of 1,000,000 records: peak GB", [peak / 1e9], ("<=", 2))
    note("board of 1,000,000 records by 100,000: seconds", [seconds[1_000_000] / seconds[100_000]], ("<=", 10))


def test_a_subject_against_its_rivals(note: Callable[..., None]) -> None:
    """90 cells, 100 samples, 2,000 resamples."""
    generator = np.random.default_rng(1)
    records = [
        r
        for m in ("mine", *(f"m{i}" for i in range(14)))
        for budget in ("32", "64", "128", "256", "512", "1024")
        for t in range(10)
        for r in scored(m, f"{'niah' if t < 5 else 'longbench'}/{t}", generator.random(10).tolist(), budget=budget)
    ]
    grid = Grid(records, seed=0, resamples=2000)
    begin = time.perf_counter()
    rivals = compare(grid, "mine")
    note("rivals of 90 cells, 100 samples: seconds", [time.perf_counter() - begin], ("<=", 5))
    assert len(rivals) == 6 * 2 * 3
