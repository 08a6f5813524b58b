"""Pages from pretend records: what they say, that nothing breaks a table, and that they are reproducible."""

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
from leaderboards.tables.board import main_frame, to_csv, to_markdown, to_terminal, write_board
from leaderboards.tables.sections import sections
from tests import pretend

METHODS = (("fullkv", "full"), ("snapkv", "64"), ("snapkv", "128"), ("compilerkv@paper", "64"), ("h2o", "128"))


def record(method: str, budget: str, task: str, sample: str, score: float | None = 1.0, **changes: Any) -> Record:
    return pretend.record(
        *(method, budget, sample, score), **{"task": task, "kv_bytes": 3 * 2**20, "full_bytes": 12 * 2**20, **changes}
    )


def board(tasks: Sequence[str] = ("niah", "ruler/vt"), n: int = 12, **changes: Any) -> list[Record]:
    """Every method is 20 points below the one before it, give or take the sample's own part."""
    return [
        record(method, budget, task, str(s), 1 - 0.2 * i - 0.05 * (s * (i + 1) % 3), nll=1 + i / 8, **changes)
        for i, (method, budget) in enumerate(METHODS)
        for task in tasks
        for s in range(n)
    ]


def failures(status: str, error: str, n: int, task: str = "niah") -> list[Record]:
    return [record("h2o", "64", task, str(s), None, status=status, error=error.format(s)) for s in range(n)]


def tables_of(markdown: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in markdown.split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def cells_of(block: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Budget and method to the cells of each line of a table."""
    lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
    return {(cells[0], cells[1]): cells for cells in lines}


def test_the_ranking_says_what_the_records_say() -> None:
    rows = {(r["budget"], r["method"]): r for r in main_frame(aggregate(board(n=24))[0]).to_dict("records")}
    full, snapkv, compiler = rows["full", "fullkv"], rows["64", "snapkv"], rows["64", "compilerkv@paper"]
    assert full["score"].startswith("95.0 ± ")
    assert full["Δ fullkv"] == "-" == full["Δ snapkv"]
    assert snapkv["score"].endswith(" *") and not compiler["score"].endswith(("*", "="))
    assert snapkv["Δ fullkv"].startswith("-20.0 [-") and compiler["Δ snapkv"].startswith("-40.0 [-")
    assert [snapkv[name] for name in ("KV MiB", "KV %", "n", "NLL")] == ["3.000", "25.0", "48", "1.125"]
    assert snapkv["ΔNLL fullkv"] == "+0.125 [+0.125, +0.125]"
    assert compiler["ΔNLL snapkv"] == "+0.250 [+0.250, +0.250]"


def test_page_has_header_tables_and_legend() -> None:
    page = to_markdown(aggregate(board()), title="quick")
    assert page.startswith(
        "# quick\n\n## tiny, float32 on unknown processor, query-aware, first token compressed, seed 42\n"
    )
    for text in ("samples: 24 of 2 tasks: niah, ruler/vt", "runs: run1", "How to read", "95%", "seed 0", "unweighted"):
        assert text in page
    main, tasks, visible, ranks, *smallest, tails, ruler = tables_of(page)
    assert [line.split("|")[1].strip() for line in visible[2:]] == [
        "niah",
        "ruler/vt",
        "niah (family)",
        "ruler (family)",
        "all tasks",
    ]
    assert main[0].split()[1] == "budget" and "ruler/vt" in tasks[0]
    assert "unknown" in ruler[0]  # pretend records have no length
    assert len(main) == len(tasks) == len(tails) == len(ruler) == len(METHODS) + 2
    assert len(ranks) == len(METHODS) - 1 + 2  # fullkv has no budget
    assert [len(own) for own in smallest] == [3 + 2] * 2  # a row per method


def test_terminal_fits_and_loses_nothing() -> None:
    names = ("qasper", "hotpotqa", "multi_news", "passage_retrieval_en", "trec", "lcc")
    tasks = [*(f"longbench/{name}" for name in names), *(f"ruler/niah_multikey_{i}" for i in range(3))]
    tables = aggregate(board(tasks))
    text = to_terminal(tables)
    assert max(map(len, text.splitlines())) <= 120
    assert [column for column in (*main_frame(tables[0]), *tasks) if column not in text] == []
    first = text.split("\n\n")[1]  # the ranking itself needs no folding
    assert "Δ snapkv" in first and "flags" in first and "compilerkv@paper" in first


def test_lacking_samples_are_shown_and_notes_counted_by_method() -> None:
    ok = [record("h2o", "64", "niah", str(s)) for s in range(6, 12)]
    page = to_markdown(aggregate(board() + failures("oom", "needs 9 GiB", 6) + ok), title="b")
    main, tasks = (cells_of(block)["64", "h2o"] for block in tables_of(page)[:2])
    assert "iow" in main and "6" in main
    assert tasks[2:] == ["100.0 (6)", "-"]
    assert "- h2o at 64: oom (6 records); first error: needs 9 GiB" in page
    records = [record("flat", b, "niah", "0", notes=("neutral tables",)) for b in ("64", "128")]
    records += [record("fat", "64", "niah", "0", over_budget=True)]
    page = to_markdown(aggregate(board() + records), title="b")
    assert "- flat at 64, 128: neutral tables (2 records)" in page
    assert "- fat at 64: over budget (1 records)" in page


def test_averages_have_sections_and_say_what_they_lack() -> None:
    """Thirteen of sixteen datasets, and one method without the last sample of one of them."""
    names = [n for names in ENGLISH.values() for n in names if n not in ("narrativeqa", "musique", "lcc")]
    records = board([f"longbench/{name}" for name in names])
    lost = ("h2o", "longbench/trec", "11")
    records = [r for r in records if (r.method, r.task, r.sample_id) != lost]
    records += [record("h2o", "128", *lost[1:], None, error="broken")]
    page = to_markdown(aggregate(records), title="b")
    (section,) = [part for part in page.split("\n### ") if part.startswith("LongBench averages, English")]
    lines = cells_of(tables_of(section)[0])
    assert lines["budget", "method"][2:] == [*ENGLISH, "Avg", "16", "flags"]
    full, h2o = lines["full", "fullkv"], lines["128", "h2o"]
    for column, lacking in ((8, r" \(13 of 16\)"), (2, r" \(2 of 3\)"), (4, "")):
        assert re.fullmatch(r"95\.0 ± \d\.\d" + lacking, full[column])
    assert h2o[8].endswith("(13 of 16, n 155/156)") and h2o[5].endswith("(n 35/36)")
    assert (full[-1], h2o[-1]) == ("", "if")
    assert "(13 of 16): the mean of the 13 tasks there are" in page
    assert "LongBench averages, English\nbudget" in to_terminal(aggregate(records))


def test_needle_share_is_a_column_where_there_are_needles() -> None:
    needles = {"needle_tokens": 4, "needle_kept": ((4, 1), (0, 0)), "meta": {"depth": 44, "length": 1024}}
    (table,) = aggregate(board(["niah/kamradt"], **needles))
    assert set(main_frame(table)["needle %"]) == {"31.2"}
    assert "needle %" not in main_frame(aggregate(board())[0])
    (scores, kept) = [title for title in sections(table) if "NIAH" in title]
    assert (scores, kept) == ("NIAH by depth", "NIAH: needle tokens still cached by depth, %")
    assert list(sections(table)[scores]) == ["budget", "method", "40-60", "needle %", "flags"]
    assert set(sections(table)[kept]["40-60"]) == {"31.2 ± 0.0"}


NASTY = st.text(st.sampled_from("a|\\\n\r\t`*<>[]\u2028\x1b\u202e=é@"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(method=NASTY, note=NASTY, error=NASTY, task=NASTY)
def test_text_from_outside_breaks_no_table(
    tmp_path_factory: pytest.TempPathFactory, method: str, note: str, error: str, task: str
) -> None:
    records = [
        record(f"m{method}", "64", f"t{task}", "0", notes=(note,)),
        record(f"m{method}", "64", f"longbench/{task}/lcc", "0"),
        record(f"m{method}", "64", f"t{task}", "1", None, error=error),
        *(record(f"b{error}", "64", f"t{task}", sample) for sample in "01"),
        record(f"b{error}", "64", f"longbench/{task}/lcc", "0"),
    ]
    tables = aggregate(records, subject=f"m{method}")
    page, *csvs = (path.read_text() for path in write_board(tables, tmp_path_factory.getbasetemp(), "b"))
    blocks = tables_of(page)
    assert [len(block) for block in blocks[-3:]] == [7, 4, 4]  # visible, ranks and averages of the variant
    assert len(blocks) == 6 and len(csvs) == 5  # the ranking, the tasks and the rivals too
    for block in blocks:  # GitHub splits at pipes that no backslash escapes
        assert len({line.replace("\\\\", "").replace("\\|", "").count("|") for line in block}) == 1
    for text in (page, to_terminal(tables), *csvs):
        assert not set(text) & set("\r\t\u2028\x1b\u202e")
    assert len(pd.read_csv(io.StringIO(csvs[0]), keep_default_na=False)) == 2


def test_csv_is_complete_and_numeric() -> None:
    tables = aggregate(board() + board(query="agnostic", run_id="run2"))
    frame = pd.read_csv(io.StringIO(to_csv(tables)))
    assert len(frame) == 2 * len(METHODS) and set(frame["query"]) == {"aware", "agnostic"}
    row = frame[(frame.method == "compilerkv@paper") & (frame["query"] == "aware")].iloc[0]
    expected = tables[1].rows[tables[1].rows.method == "compilerkv@paper"].iloc[0]
    assert set(expected.index) <= set(frame)
    numbers = {name: v for name, v in expected.items() if isinstance(v, float) and not math.isnan(v)}
    assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-9)
    assert row.score_points_vs_snapkv_low < row.score_points_vs_snapkv_mean < row.score_points_vs_snapkv_high < 0
    assert (row.kv_bytes_mean, row.baseline_snapkv, row.run_ids) == (3 * 2**20, "snapkv", "run1")


def test_the_other_csv_files_are_complete_and_numeric(tmp_path: Path) -> None:
    """Two tables of which one has no averages."""
    tables = aggregate(board(["niah", "longbench/lcc"]) + board(["stdlib/next_line"], query="agnostic", run_id="run2"))
    tasks, frame = map(pd.read_csv, write_board(tables, tmp_path, "b")[2:4])
    assert len(tasks) == 3 * len(METHODS)
    row = tasks[(tasks.method == "h2o") & (tasks.task == "niah")].iloc[0]
    assert [row[c] for c in ("model", "query", "seed", "budget", "n_ok")] == ["tiny", "aware", 42, "128", 12]
    assert row.score_points_mean == pytest.approx(15)
    assert list(frame) == [
        "model", "dtype", "processor", "query", "first_token", "seed", "settings", "budget", "method", "summary",
        "column", "mean", "low", "high", "n", "n_expected", "tasks_present", "tasks_expected", "flags",
    ]  # fmt: skip
    assert len(frame) == 3 * len(METHODS) and set(frame["query"]) == {"aware"}
    row = frame[(frame.method == "h2o") & (frame.column == "Avg")].iloc[0]
    assert (row["mean"], row.n, row.tasks_present, row.tasks_expected) == (pytest.approx(15), 12, 1, 16)
    assert row.low < row["mean"] < row.high
    nothing = write_board(tables[:1], tmp_path, "none")[3].read_text()
    assert nothing.count("\n") == 1 and nothing.startswith("model,dtype,")


def test_same_records_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    records = board(["niah/kamradt", "ruler/vt"], meta={"depth": 50, "length": 1024})
    records += failures("failed", "error {}", 5, "niah/kamradt")
    first = write_board(aggregate(records), tmp_path / "one", "quick")
    Random(1).shuffle(records)
    second = write_board(aggregate(records), tmp_path / "two", "quick")
    kinds = ("md", "csv", "tasks.csv", "summary.csv", "visible.csv", "closed.csv")
    assert [p.name for p in first] == [f"quick.{kind}" for kind in kinds]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert b"first error: error 0" in first[0].read_bytes()


def test_manifests_tell_settings_code_and_unfinished_runs() -> None:
    runs = [
        pretend.manifest(max_tokens=tokens).model_copy(update={"status": status, "git_commit": f"{tokens:040d}"})
        for tokens, status in ((2048, "finished"), (512, "interrupted"))
    ]
    records = [r for m in runs for r in board(run_id=m.run_id)]
    page = to_markdown(aggregate(records, manifests=runs), title="b", manifests=runs)
    headings = [line for line in page.splitlines() if line.startswith("## tiny")]
    assert [line.rpartition(", ")[2] for line in headings] == ["max_tokens 2048", "max_tokens 512"]
    assert page.count("unfinished runs") == 1
    assert f"unfinished runs: {runs[1].run_id} (interrupted)" in page and "code: 000000000000" in page


def test_unusable_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, name, says in ((tmp_path, "../up", "is no file name"), (tmp_path / "file", "b", "cannot create")):
        with pytest.raises(HarnessError, match=says):
            write_board(aggregate(board()), folder, name)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
