"""Pages from pretend records: what they say, that nothing breaks a table, and that they are reproducible."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.records.record import Record
from leaderboards.stats.aggregate import aggregate
from leaderboards.stats.summaries import ENGLISH
from leaderboards.tables.board import (
    main_frame,
    rivals_to_csv,
    summaries_to_csv,
    tasks_to_csv,
    to_csv,
    to_markdown,
    to_terminal,
    write_board,
)
from leaderboards.tables.sections import sections
from tests import pretend
from tests.pretend import manifest

METHODS = (("fullkv", "full"), ("snapkv", "64"), ("snapkv", "128"), ("compilerkv@paper", "64"), ("h2o", "128"))


def record(method: str, budget: str, task: str, sample: str, **changes: Any) -> Record:
    sizes = {"kv_bytes": 3 * 2**20, "full_bytes": 12 * 2**20}
    return pretend.record(method, budget, sample, None, **{"task": task, "status": "ok", **sizes, **changes})


def board(tasks: Sequence[str] = ("niah", "ruler/vt"), n: int = 12) -> list[Record]:
    """Every method is 20 points below the one before it, give or take the sample's own part."""
    records = []
    for i, (method, budget) in enumerate(METHODS):
        for task in tasks:
            for s in range(n):
                score = 1.0 - 0.2 * i - 0.05 * ((s * (i + 1)) % 3)
                records.append(record(method, budget, task, str(s), metrics={"score": score}, nll=1.0 + i / 8))
    return records


def columns_of(line: str) -> int:
    """Cells of a table row as GitHub splits it: at pipes that no backslash escapes."""
    return line.replace("\\\\", "").replace("\\|", "").count("|") - 1


def tables_of(markdown: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in markdown.split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def test_the_ranking_says_what_the_records_say() -> None:
    rows = {(r["budget"], r["method"]): r for r in main_frame(aggregate(board())[0]).to_dict("records")}
    full, snapkv, compiler = rows["full", "fullkv"], rows["64", "snapkv"], rows["64", "compilerkv@paper"]
    assert full["score"].startswith("95.0 ± ")
    assert full["Δ fullkv"] == "-" == full["Δ snapkv"]
    assert snapkv["score"].endswith(" *")
    assert not compiler["score"].endswith(("*", "="))
    assert snapkv["Δ fullkv"].startswith("-20.0 [-")
    assert compiler["Δ snapkv"].startswith("-40.0 [-")
    assert snapkv["KV MiB"] == "3.000"
    assert snapkv["KV %"] == "25.0"
    assert snapkv["n"] == "24"
    assert snapkv["NLL"] == "1.125"
    assert snapkv["ΔNLL fullkv"] == "+0.125 [+0.125, +0.125]"
    assert compiler["ΔNLL snapkv"] == "+0.250 [+0.250, +0.250]"


def test_page_has_header_tables_and_legend() -> None:
    page = to_markdown(aggregate(board()), title="quick")
    assert page.startswith("# quick\n\n## tiny, float32, query-aware, first token compressed, seed 42\n")
    for text in ("samples: 24 of 2 tasks: niah, ruler/vt", "runs: run1", "How to read", "95%", "seed 0", "unweighted"):
        assert text in page
    main, tasks, ranks, tails, ruler = tables_of(page)
    assert main[0].split()[1] == "budget"
    assert "ruler/vt" in tasks[0]
    assert "unknown" in ruler[0]  # pretend records have no length
    assert len(main) == len(tasks) == len(tails) == len(ruler) == len(METHODS) + 2
    assert len(ranks) == len(METHODS) - 1 + 2  # fullkv has no budget


def test_terminal_fits_and_loses_nothing() -> None:
    tasks = [
        f"longbench/{name}" for name in ("qasper", "hotpotqa", "multi_news", "passage_retrieval_en", "trec", "lcc")
    ]
    tables = aggregate(board([*tasks, *(f"ruler/niah_multikey_{i}" for i in range(3))]))
    text = to_terminal(tables)
    assert max(map(len, text.splitlines())) <= 120
    for column in (*main_frame(tables[0]), *tasks):
        assert column in text
    first = text.split("\n\n")[1]  # the ranking itself needs no folding
    assert "Δ snapkv" in first
    assert "flags" in first
    assert "compilerkv@paper" in first


def test_lacking_samples_are_shown() -> None:
    records = board(n=12)
    oom = [record("h2o", "64", "niah", str(s), status="oom", error="needs 9 GiB") for s in range(6)]
    ok = [record("h2o", "64", "niah", str(s), metrics={"score": 1.0}) for s in range(6, 12)]
    page = to_markdown(aggregate(records + oom + ok), title="b")
    (row,) = [line for line in tables_of(page)[0] if "h2o" in line and " 64 " in line]
    assert " iow " in row.replace("|", " ")
    assert " 6 " in row.replace("|", " ")
    (row,) = [line for line in tables_of(page)[1] if "h2o" in line and " 64 " in line]
    assert "100.0 (6)" in row
    assert " - " in row
    assert "- h2o at 64: oom (6 records); first error: needs 9 GiB" in page


def test_averages_have_sections_and_say_what_they_lack() -> None:
    """Thirteen of sixteen datasets, and one method without the last sample of one of them."""
    names = [n for names in ENGLISH.values() for n in names if n not in ("narrativeqa", "musique", "lcc")]
    records = board([f"longbench/{name}" for name in names])
    lost = ("h2o", "longbench/trec", "11")
    records = [r for r in records if (r.method, r.task, r.sample_id) != lost]
    records += [record(lost[0], "128", lost[1], lost[2], status="failed", error="broken")]
    page = to_markdown(aggregate(records), title="b")
    (section,) = [part for part in page.split("\n### ") if part.startswith("LongBench averages, English")]
    lines = {
        tuple(cells[:2]): cells
        for line in section.splitlines()
        if line.startswith("|") and (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    assert lines["budget", "method"][2:] == [*ENGLISH, "Avg", "16", "flags"]
    full, h2o = lines["full", "fullkv"], lines["128", "h2o"]
    assert re.fullmatch(r"95\.0 ± \d\.\d \(13 of 16\)", full[8])
    assert re.fullmatch(r"95\.0 ± \d\.\d \(2 of 3\)", full[2])
    assert re.fullmatch(r"95\.0 ± \d\.\d", full[4])
    assert full[-1] == ""
    assert h2o[8].endswith("(13 of 16, n 155/156)")
    assert h2o[5].endswith("(n 35/36)")
    assert h2o[-1] == "if"
    assert "(13 of 16): the mean of the 13 tasks there are" in page
    assert "LongBench averages, English\nbudget" in to_terminal(aggregate(records))


def test_needle_share_is_a_column_where_there_are_needles() -> None:
    needles = {"needle_tokens": 4, "needle_kept": ((4, 1), (0, 0)), "meta": {"depth": 44, "length": 1024}}
    tables = aggregate([r.model_copy(update=needles) for r in board(["niah/kamradt"])])
    assert {row["needle %"] for row in main_frame(tables[0]).to_dict("records")} == {"31.2"}
    assert "needle %" not in main_frame(aggregate(board())[0])
    titles = [title for title in sections(tables[0]) if "NIAH" in title]
    assert titles == ["NIAH by depth", "NIAH: needle tokens still cached by depth, %"]
    assert list(sections(tables[0])[titles[0]]) == ["budget", "method", "40-60", "needle %", "flags"]
    assert set(sections(tables[0])[titles[1]]["40-60"]) == {"31.2 ± 0.0"}


def test_notes_are_counted_by_method() -> None:
    records = board()
    records += [
        record("flat", b, "niah", "0", metrics={"score": 1.0}, notes=("neutral tables",)) for b in ("64", "128")
    ]
    records += [record("fat", "64", "niah", "0", metrics={"score": 1.0}, over_budget=True)]
    page = to_markdown(aggregate(records), title="b")
    assert "- flat at 64, 128: neutral tables (2 records)" in page
    assert "- fat at 64: over budget (1 records)" in page


NASTY = st.text(st.sampled_from("a|\\\n\r\t`*<>[]\u2028\x1b\u202e=é@"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(method=NASTY, note=NASTY, error=NASTY, task=NASTY)
def test_text_from_outside_breaks_no_table(method: str, note: str, error: str, task: str) -> None:
    records = [
        record(f"m{method}", "64", f"t{task}", "0", metrics={"score": 1.0}, notes=(note,)),
        record(f"m{method}", "64", f"longbench/{task}/lcc", "0", metrics={"score": 1.0}),
        record(f"m{method}", "64", f"t{task}", "1", status="failed", error=error),
        record("b", "64", f"t{task}", "0", metrics={"score": 1.0}),
    ]
    tables = aggregate(records, subject=f"m{method}")
    page = to_markdown(tables, title="b")
    blocks = tables_of(page)
    assert [len(block) for block in blocks[-3:]] == [4, 4, 4]  # tasks, ranks and averages of the variant
    assert len(blocks) == 5  # the ranking and the rivals too
    for block in blocks:
        assert len({columns_of(line) for line in block}) == 1
    csvs = [write(tables) for write in (to_csv, tasks_to_csv, summaries_to_csv, rivals_to_csv)]
    for text in (page, to_terminal(tables), *csvs):
        assert not set(text) & set("\r\t\u2028\x1b\u202e")
    assert len(pd.read_csv(io.StringIO(csvs[0]), keep_default_na=False)) == 2


def test_csv_is_complete_and_numeric() -> None:
    tables = aggregate(board() + [r.model_copy(update={"query": "agnostic", "run_id": "run2"}) for r in board()])
    frame = pd.read_csv(io.StringIO(to_csv(tables)))
    assert len(frame) == 2 * len(METHODS)
    assert set(frame["query"]) == {"aware", "agnostic"}
    row = frame[(frame.method == "compilerkv@paper") & (frame["query"] == "aware")].iloc[0]
    expected = tables[1].rows[tables[1].rows.method == "compilerkv@paper"].iloc[0]
    for column in expected.index:
        assert column in frame.columns
        if isinstance(expected[column], float) and not math.isnan(expected[column]):
            assert row[column] == pytest.approx(expected[column], rel=1e-9)
    assert row.score_points_vs_snapkv_low < row.score_points_vs_snapkv_mean < row.score_points_vs_snapkv_high < 0
    assert row.kv_bytes_mean == 3 * 2**20
    assert row.baseline_snapkv == "snapkv"
    assert row.run_ids == "run1"


def test_the_other_csv_files_are_complete_and_numeric() -> None:
    """Two tables of which one has no averages."""
    tables = aggregate(
        board(["niah", "longbench/lcc"])
        + [r.model_copy(update={"query": "agnostic", "run_id": "run2"}) for r in board(["stdlib/next_line"])]
    )
    tasks = pd.read_csv(io.StringIO(tasks_to_csv(tables)))
    assert len(tasks) == 3 * len(METHODS)
    row = tasks[(tasks.method == "h2o") & (tasks.task == "niah")].iloc[0]
    assert [row[c] for c in ("model", "query", "seed", "budget", "n_ok")] == ["tiny", "aware", 42, "128", 12]
    assert row.score_points_mean == pytest.approx(15)
    frame = pd.read_csv(io.StringIO(summaries_to_csv(tables)))
    assert list(frame) == [
        "model", "dtype", "query", "first_token", "seed", "settings", "budget", "method", "summary", "column", "mean",
        "low", "high", "n", "n_expected", "tasks_present", "tasks_expected", "flags",
    ]  # fmt: skip
    assert len(frame) == 3 * len(METHODS)
    row = frame[(frame.method == "h2o") & (frame.column == "Avg")].iloc[0]
    assert (row["mean"], row.n, row.tasks_present, row.tasks_expected) == (pytest.approx(15), 12, 1, 16)
    assert row.low < row["mean"] < row.high
    assert set(frame["query"]) == {"aware"}
    nothing = summaries_to_csv(tables[:1])
    assert nothing.count("\n") == 1
    assert nothing.startswith("model,dtype,")


def test_same_records_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    records = [
        r.model_copy(update={"meta": {"depth": 50, "length": 1024}}) for r in board(["niah/kamradt", "ruler/vt"])
    ]
    records += [record("h2o", "64", "niah/kamradt", str(s), status="failed", error=f"error {s}") for s in range(5)]
    first = write_board(aggregate(records), tmp_path / "one", "quick")
    Random(1).shuffle(records)
    second = write_board(aggregate(records), tmp_path / "two", "quick")
    assert [p.name for p in first] == ["quick.md", "quick.csv", "quick.tasks.csv", "quick.summary.csv"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert b"first error: error 0" in first[0].read_bytes()


def test_manifests_tell_settings_code_and_unfinished_runs(tmp_path: Path) -> None:
    runs = [
        manifest(max_tokens=tokens).model_copy(update={"status": status, "git_commit": f"{tokens:040d}"})
        for tokens, status in ((2048, "finished"), (512, "interrupted"))
    ]
    records = [r.model_copy(update={"run_id": m.run_id}) for m in runs for r in board()]
    page = write_board(aggregate(records, manifests=runs), tmp_path, "b", manifests=runs)[0].read_text()
    headings = [line for line in page.splitlines() if line.startswith("## tiny")]
    assert [line.rpartition(", ")[2] for line in headings] == ["max_tokens 2048", "max_tokens 512"]
    assert page.count("unfinished runs") == 1
    assert f"unfinished runs: {runs[1].run_id} (interrupted)" in page
    assert "code: 000000000000" in page


def test_unusable_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="is no file name"):
        write_board(aggregate(board()), tmp_path, "../up")
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="cannot create"):
        write_board(aggregate(board()), tmp_path / "file", "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
