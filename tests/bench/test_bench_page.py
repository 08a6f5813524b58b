"""How soon the page of a board of 200 rows opens in a headless Chromium, and how large it is. Prints; fails nothing.

Beside the seconds to the load event, which a busy machine stretches, it prints the processor time of the page's thread.
"""

import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from harness.records.record import Record
from leaderboards.pages.page import write_page
from leaderboards.stats.aggregate import aggregate
from tests.pretend import record

api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.bench, pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt install chromium")]

BUDGETS = ("64", "128", "256", "512", "1024")
METHODS, TASKS, SAMPLES, ROUNDS = 40, 9, 12, 5
LAYERS, HEADS = 30, 3
OPENED = "() => { const [n] = performance.getEntriesByType('navigation'); return n.loadEventEnd - n.startTime; }"
DRAWN = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN"
SAMPLES_OF_PAGE = r'<script type="application/json" id="samples">.*?</script>'


def board() -> list[Record]:
    """201 rows: fullkv, and 40 methods at 5 budgets, on 9 needle tasks of 12 samples."""
    cells = [("fullkv", "full"), *((f"method{m}", budget) for budget in BUDGETS for m in range(METHODS))]
    return [
        record(
            *(method, budget, str(s), ((i * 7 + t * 3 + s * 5) % 21) / 20),
            task=f"niah/task{t}",
            prediction=f"the answer to {s} that {method} gives at {budget} " * 4,
            answers=("right",),
            needle_tokens=8,
            needle_kept=(((i + s) % 9,) * HEADS,) * LAYERS,
            nll=1 + (i + s) % 7 / 4,
            nll_tokens=8,
            meta={"depth": 10 * (s % 11), "length": 1024 * (1 + s % 4)},
            kv_bytes=2**20 if budget == "full" else 2**9 * int(budget),
            full_bytes=2**20,
        )
        for i, (method, budget) in enumerate(cells)
        for t in range(TASKS)
        for s in range(SAMPLES)
    ]


def test_page_of_two_hundred_rows(tmp_path: Path) -> None:
    records = board()
    path = write_page(aggregate(records), records, tmp_path, "bench", manifests=())
    html = path.read_text(encoding="utf-8")
    whole, without = len(html.encode()), len(re.sub(SAMPLES_OF_PAGE, "", html, flags=re.S).encode())
    loads, paints, works = list[float](), list[float](), list[float]()
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for _ in range(ROUNDS):
            page: Any = browser.new_page()
            meter = page.context.new_cdp_session(page)
            meter.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto(path.as_uri())
            rows = page.locator("#ranking tbody tr").count()
            loads.append(page.evaluate(OPENED) / 1000)
            paints.append(page.evaluate(DRAWN) / 1000)
            metrics = {one["name"]: one["value"] for one in meter.send("Performance.getMetrics")["metrics"]}
            works.append(metrics["TaskDuration"])
            page.close()
        browser.close()
    print(
        f"\npage of {rows} rows: opened in {statistics.median(loads):.2f} s ({min(loads):.2f} to {max(loads):.2f}, "
        f"{ROUNDS} rounds; goal < 2), first paint {statistics.median(paints):.2f} s, "
        f"processor time {statistics.median(works):.2f} s; {without / 1e6:.2f} MB without the sample "
        f"browser (goal < 8), {whole / 1e6:.2f} MB with it"
    )
