"""The frontier's table, page and picture from stored searches alone."""

import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib.image
import pandas as pd
import pytest

from harness.errors import HarnessError
from harness.records.boundary_folder import BoundaryManifest, BoundaryRecord, BoundaryStore, Found, Tried
from harness.records.spec import ModelSpec
from leaderboards.tables.boundary import draw, frame, to_csv, to_markdown, to_terminal, write_boundary

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "a|b\n<script>$\\frac$[x](y)`"

MANIFEST = BoundaryManifest(
    **{"command": ("harness", "boundary"), "created": "2026-01-01T00:00:00+00:00", "context": 4096, "threads": 1},
    **{"limit_bytes": 512 * 2**20, "limit_kind": "address space", "model_bytes": 300 * 2**20, "chunk": None},
    **{"new_tokens": 32, "timeout_s": 600.0},
    model=ModelSpec(name="tiny", revision="r", dtype="float32", device="cpu"),
    notes=("limit by address space, no cgroup of its own",),
    machine={"processor": "A <processor>", "system": "Linux", "accelerators": []},
)


def record(method: str, budget: str, answer: int, *, at: int | None = None, **changes: Any) -> BoundaryRecord:
    """A search that ended at `answer`, with 2 MiB at its edge, and out of memory one step further."""
    step = 1 if at else 256
    (tokens, batch), (more, larger) = [((at, n) if at else (n, 1)) for n in (answer, answer + step)]
    edge = Tried(tokens=tokens, batch=batch, status="ok", seconds=1.0, peak_bytes=2**21, predicted_bytes=9)
    past = Tried(tokens=more, batch=larger, status="oom", seconds=1.0, error="no memory")
    values: dict[str, Any] = {
        **{"method": method, "budget": budget, "kind": "batch" if at else "context", "at_context": at},
        **{"limit_bytes": MANIFEST.limit_bytes, "least": step, "most": 64 * step, "step": step},
        "found": Found(answer=answer, next_size=answer + step, next_status="oom"),
        "probes": (edge, past) if answer else (past,),
    }
    return BoundaryRecord(**{**values, **changes})


def searches() -> list[BoundaryRecord]:
    hung = Tried(tokens=2048, batch=3, status="timeout", seconds=600.0, error="no answer")
    return [
        record("fullkv", "full", 1024),
        record("fullkv", "full", 0, at=2048),
        record("snapkv", "128", 4096, found=Found(answer=4096, whole=True)),
        record("snapkv", "128", 2, at=2048, found=Found(answer=2, next_size=3, next_status="timeout"), probes=(hung,)),
        record("snapkv", "64", 3072),
        record("snapkv", "64", 5, at=2048, found=None),
    ]


def stored(folder: Path, records: list[BoundaryRecord]) -> Path:
    with BoundaryStore(folder, MANIFEST) as store:
        for each in records:
            store.put(each)
    return folder


def test_the_table_says_what_was_found_and_what_was_not() -> None:
    rows, kinds = frame(searches()), ("context", "batch at 2048")
    names = [name for k in kinds for name in (f"largest {k}", f"{k}: peak MiB", f"{k}: next")]
    assert list(rows) == ["budget", "method", *names]
    assert rows.to_numpy().tolist() == [
        ["full", "fullkv", "1024", "2.0", "1280 oom", "0", "-", "1 oom"],
        ["64", "snapkv", "3072", "2.0", "3328 oom", "unfinished", "-", "-"],
        ["128", "snapkv", "≥ 4096", "2.0", "-", "2", "-", "3 timeout"],
    ]


def test_what_a_gpu_said_of_itself_is_a_fact() -> None:
    def page(**machine: Any) -> str:
        own = MANIFEST.model_copy(update={"machine": machine})
        return to_markdown(searches(), own, picture="p.svg")

    told = {"name": "NVIDIA <H100>", "driver": "570.86", "sm_mhz": 1980.0, "odd": [HOSTILE]}
    assert "gpu at the start: name NVIDIA \\<H100\\>, driver 570.86, sm_mhz 1980.0\n" in page(gpu=told)
    assert all("gpu at the start" not in page(**own) for own in ({}, {"gpu": None}, {"gpu": [HOSTILE]}, {"gpu": {}}))


def test_the_csv_is_in_bytes_with_a_row_per_search() -> None:
    rows = pd.read_csv(io.StringIO(to_csv(searches(), MANIFEST)))
    assert len(rows) == 6 and list(rows["kind"]) == ["context", "batch"] * 3
    first, whole = rows.iloc[0], rows[(rows["budget"] == "128") & (rows["kind"] == "context")].iloc[0]
    assert (first["answer"], first["peak_bytes"], first["predicted_bytes"]) == (1024, 2**21, 9)
    assert (first["next_size"], first["next_status"], first["limit_bytes"]) == (1280, "oom", 512 * 2**20)
    assert whole["everything_fits"] == True and pd.isna(whole["next_size"])  # noqa: E712


def test_page_and_terminal_name_the_limit_and_the_probes_that_hung() -> None:
    page = to_markdown(searches(), MANIFEST, picture="frontier.svg")
    assert "# Boundary under 512 MiB: tiny (float32, cpu)" in page
    assert f"{512 * 2**20} bytes by address space" in page and "no cgroup of its own" in page
    assert "A \\<processor\\>" in page
    assert "- snapkv at 128: 2048 tokens x 3: timeout after 600.0 s no answer" in page
    assert "![Bars by method and budget. fullkv at full: largest context 1024, next 1280 oom;" in page
    assert "](frontier.svg)" in page
    assert "timeout after" not in to_markdown(searches()[:1], MANIFEST, picture="p.svg")
    text = to_terminal(searches(), MANIFEST)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "≥ 4096" in text and "1280 oom" in text and "timeout after 600.0 s" in text


def test_files_are_written_beside_the_records_and_reproducible(tmp_path: Path) -> None:
    paths, again = (write_boundary(stored(tmp_path / name, searches())) for name in "ab")
    assert [path.name for path in paths] == ["frontier.md", "frontier.csv", "frontier.svg", "frontier.png"]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    with pytest.raises(HarnessError, match="run `harness boundary` first"):
        write_boundary(tmp_path)
    with pytest.raises(HarnessError, match="no search in"):
        write_boundary(stored(tmp_path, []))


def test_the_picture_has_bars_labels_and_a_text_alternative() -> None:
    svg, png = draw(searches(), MANIFEST, salt="t")
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root[0].tag == f"{SVG}title" and root[1].tag == f"{SVG}desc"
    assert root[1].text is not None and "snapkv at 128: largest context at least 4096;" in root[1].text
    words = {"".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")}
    assert {"≥ 4096", "next: 1280 oom", "next: 3 timeout", "unfinished", "prompt tokens", "prompts"} <= words
    assert len({fill.get("id") for fill in root.iter(f"{SVG}pattern")}) >= 2  # hatches tell budgets apart
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    assert abs(pixels - pixels.mean(axis=-1, keepdims=True)).max() < 0.01  # grey is all it needs


def test_a_hostile_label_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = stored(tmp_path, [record(HOSTILE, "128", 512), record("snapkv", "128", 512)])
    page, table, svg, _ = (path.read_bytes() for path in write_boundary(folder))
    text = page.decode()
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "a\\|b" in text and "[x](y)" not in text and "\\`" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert len(pd.read_csv(io.BytesIO(table))) == 2
    root = ET.fromstring(svg)
    assert not list(root.iter(f"{SVG}script"))
    assert any("a|b <script>$\\frac$" in "".join(node.itertext()) for node in root.iter(f"{SVG}text"))
