"""Boards of odd but legal records: every kind of board comes out, valid UTF-8, and its CSV holds the same labels."""

import csv
import io
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree as ET

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.records.record import Record
from leaderboards.pages.page import to_html
from leaderboards.stats.aggregate import Table, aggregate
from leaderboards.tables.board import to_csv, to_markdown, to_terminal
from leaderboards.tables.picture import write_picture
from leaderboards.text import FORMULA, LABEL_CHARS, clean, csv_text, distinct
from tests.hostile import tried
from tests.pretend import Spread, manifest, measured, record

pytestmark = pytest.mark.hostile

ODD = (
    *("$\\frac$", "$", "$$", "$x^2$", "_", "_hidden", "^", "\\", "\\n", "%s", "{x}", "{{x}}", "{% raw %}", "#", "a|b"),
    *("`x`", "*x*", "_x_", "~~x~~", "<b>", "</script>", "<!--", "]]>", "&amp;", "&#60;", '"', "'", "[a](b)", "![a](b)"),
    *("a\nb", "a\r\nb", "\x1b[31mred", "\x00", "\x7f", "\u202eabc", "\u200b", "\ufeffx", "\uffff", "\u2028", "\t", ""),
    *(" ", "=1+1", "+x", "-x", "@x", "\t=1", "\r=1", " =1", "＝1", "'=1", "x" * 980, "é", "نص", "𝕏", "e\u0301" * 30),
    *("a,b", "a;b", "full", "nan", "-inf", "1e5", "1_0", "0.5", "-1", "budget", "method", "flags", "__proto__", "task"),
)
FAMILIES = ("niah/", "ruler/", "longbench/", "instructions/", "turns/", "long/", "graded/", "")
texts = st.one_of(st.sampled_from(ODD), st.text(max_size=20))
sizes = st.one_of(st.sampled_from([0, 1, 2**62, 2**63 - 1]), st.integers(0, 2**63 - 1))
shares = st.one_of(st.sampled_from([0.0, 5e-324, 1e-12, 0.5, 1.0]), st.floats(0, 1))
seconds = st.sampled_from([0.0, 5e-324, 0.01, 1e12])
names = st.lists(texts, min_size=1, max_size=3, unique=True)


@st.composite
def values(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of one record, all of them within their ranges."""
    fields = ("kv_bytes", "asked_bytes", "full_bytes", "stored_bytes", "stored_bytes_end", "kv_bytes_end")
    found: dict[str, Any] = {name: draw(sizes) for name in fields}
    score, status = draw(shares), draw(st.sampled_from(["ok", "ok", "ok", "failed", "oom", "skipped"]))
    places = {"group": texts, "depth": st.one_of(st.floats(0, 100), texts), "length": st.one_of(sizes, texts)}
    found |= {"status": status, "nll": draw(st.none() | st.floats(0, 1e6)), "over_budget": draw(st.booleans())}
    found |= {"meta": {name: draw(st.none() | kind) for name, kind in places.items()}, "error": draw(st.none() | texts)}
    found |= {"notes": tuple(draw(st.lists(texts, max_size=1))), "prediction": draw(texts), "answers": (draw(texts),)}
    found |= {"environment_changes": tuple(draw(st.lists(texts, max_size=1))), "needle_tokens": draw(st.integers(0, 3))}
    found |= {
        "needle_kept": ((1, 0),),
        "observe_ms": draw(st.none() | st.floats(-1e12, 1e12)),
        "prompt_tail": draw(texts),
    }
    if status == "ok":
        found |= {"metrics": {"score": score, draw(texts): draw(shares)}}
        if draw(st.booleans()):
            found["metrics"]["ended"], found["byte_steps"] = draw(shares), draw(sizes)
        if draw(st.booleans()):
            spread = Spread.of([draw(seconds)])
            found["measured"] = measured(tpot_s=spread, ttft_s=spread, peak_bytes=draw(sizes))
    return found | {"score": score if status == "ok" else None}


@st.composite
def boards(draw: st.DrawFn) -> list[Record]:
    """A few cells on a few samples of two tasks, some of them lacking."""
    tasks = [draw(st.sampled_from(FAMILIES)) + name for name in draw(names)][:2]
    cells = [(method, budget) for method in draw(names) for budget in draw(names)][:4]
    cells = [*([("fullkv", "full")] if draw(st.booleans()) else []), *cells]
    ids, some = draw(names), draw(st.lists(values(), min_size=2, max_size=4))
    every = [(cell, task, sample) for cell in dict.fromkeys(cells) for task in dict.fromkeys(tasks) for sample in ids]
    kept = [one for i, one in enumerate(every) if i == 0 or draw(st.integers(0, 9))]
    return [
        record(*cell, sample, **{"task": task, **some[i % len(some)]}) for i, (cell, task, sample) in enumerate(kept)
    ]


def read(table: Table) -> None:
    """The CSV as a spreadsheet sees it: the same labels, and no formula."""
    lines = list(csv.DictReader(io.StringIO(to_csv([table]), newline=""), strict=True))
    for line, row in zip(lines, table.rows.to_dict("records"), strict=True):
        for name in ("method", "budget"):
            wanted = clean(row[name], longest=LABEL_CHARS)
            assert line[name] == (f"'{wanted}" if FORMULA.match(wanted) else wanted)
        assert not any(cell[:1] in "=+@\t\r" and len(cell) > 1 for cell in line.values() if cell)


class Shape(HTMLParser):
    """Scripts and handlers of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.handlers = 0, list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def look_at(page: str) -> None:
    shape = Shape(page)
    assert (shape.scripts, shape.handlers) == (3, [])  # two of data and the page's own
    page.encode()


@given(boards(), st.sampled_from([False] * 9 + [True]))
def test_odd_records_make_a_whole_board(records: list[Record], whole: bool) -> None:
    def attempt() -> None:
        run = manifest().model_copy(update={"run_id": "run1"})
        tables = aggregate(records, manifests=[run], resamples=20)
        shuffled = Random(0).sample(records, len(records))
        page = to_markdown(tables, title="b", manifests=[run])
        assert page == to_markdown(aggregate(shuffled, manifests=[run], resamples=20), title="b", manifests=[run])
        for text in (page, to_terminal(tables, manifests=[run])):
            text.encode()
            assert not any(ord(letter) < 32 and letter != "\n" for letter in text)
        for table in tables:
            read(table)
        for block in page.split("\n\n"):
            if block.startswith("|"):
                bars = {line.replace("\\\\", "").replace("\\|", "").count("|") for line in block.splitlines()}
                assert len(bars) == 1, block
        if whole:
            look_at(to_html(tables, records, title="b", manifests=[run]))

    tried("labels and numbers of a board", attempt, may_pass=True)


@pytest.mark.parametrize("field", ["method", "budget", "task", "group", "model"])
def test_pictures_and_pages_draw_every_label(field: str, tmp_path: Path) -> None:
    """All odd labels in one board; a model alone makes a table each, of which three are drawn."""
    labels = ODD if field != "model" else ODD[:3]
    records = []
    for label in labels:
        for method, budget in (("fullkv", "full"), ("snapkv", "64")):
            own = {"method": method, "budget": budget} | ({field: label} if budget == "64" or field == "model" else {})
            more = {"meta": {"group": label}} if field == "group" else {}
            cell = [own.pop("method"), own.pop("budget")]
            records.append(record(*cell, "0", 0.5, **{**(own if field != "group" else {}), **more}))
    records = list({(r.model, r.key): r for r in records}.values())
    tables = aggregate(records, resamples=20)

    def attempt() -> None:
        ET.parse(write_picture(tables, tmp_path, "b"))
        look_at(to_html(tables, records, title="b"))

    tried(f"a {field} in pictures", attempt, may_pass=True)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+1", "@A1", "\t=1", "\r=1", "\n=1", " =cmd|' /C calc'!A0", "＝1"])
def test_no_cell_of_a_csv_is_a_formula(text: str) -> None:
    def attempt() -> None:
        ((first, number),) = list(csv.reader(io.StringIO(csv_text(pd.DataFrame({"a": [text], "b": [-1.5]})))))[1:]
        assert first.startswith("'") and number == "-1.5"

    tried("formulas", attempt, may_pass=True)


def test_names_that_look_alike_stay_apart() -> None:
    told = distinct(["a b", "a\nb", "a  b", "method"], beside=["method"])
    assert list(told.values()) == ["a b", "a b (2)", "a b (3)", "method (2)"]
