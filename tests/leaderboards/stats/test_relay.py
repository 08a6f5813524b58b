"""Caches that were sent, on a board: bytes, seconds to the first token each way, and the link that decides, by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from harness.records.record import Record
from harness.records.relayed import Relayed
from leaderboards.stats.aggregate import Table
from leaderboards.tables.board import to_markdown, write_board
from leaderboards.tables.sections import sections
from tests.pretend import MIB, cell, only, record


def sent(**changes: Any) -> Relayed:
    values = {
        "sent_bytes": 5 * MIB,
        "text_bytes": MIB,
        "send_s": 0.25,
        "receive_s": 0.125,
        "ask_s": 0.125,
        "text_s": 1.5,
    }
    return Relayed(**{**values, **changes})


def answers(method: str, *relayed: Relayed | None, task: str = "relay/needle") -> list[Record]:
    return [record(method, "64", str(i), i % 2, relayed=own, task=task) for i, own in enumerate(relayed)]


def row(table: Table, method: str) -> dict[Any, Any]:
    (own,) = table.relay[table.relay.method == method].to_dict("records")
    return own


def test_the_link_on_which_both_ways_take_the_same_time() -> None:
    found = row(only(answers("a", *[sent()] * 8)), "a")
    assert (found["cache_s_median"], found["text_s_median"]) == (0.5, 1.5)
    link = found["link_bytes_per_s"]
    assert link == 4 * MIB and 0.5 + 5 * MIB / link == 1.5 + MIB / link
    assert (found["score_points_mean"], found["n"], found["sent_bytes_mean"]) == (50, 8, 5 * MIB)
    slow = row(only(answers("a", *[sent(ask_s=2.0)] * 8)), "a")
    assert math.isnan(slow["link_bytes_per_s"])  # the text is there first on any link
    tiny = row(only(answers("a", *[sent(sent_bytes=10)] * 8)), "a")
    assert tiny["link_bytes_per_s"] == 0  # the cache on any


def test_medians_over_what_was_measured_and_controls_over_what_was_tried() -> None:
    own = [sent(send_s=9.0, text_s=None), sent(depends=True), sent(depends=False), sent(depends=True), sent(), sent()]
    found = row(only(answers("a", *own)), "a")
    assert (found["depends_n"], found["control_n"]) == (2, 3)
    assert found["send_s_median"] == 0.25 and found["text_s_median"] == 1.5


def test_only_what_was_sent_counts() -> None:
    records = [*answers("a", sent(), sent()), *answers("a", None, None, None, task="niah"), *answers("b", None)]
    table = only(records)
    assert row(table, "a")["n"] == 2 and len(table.relay) == 1
    assert only(cell("a", "64", [1.0] * 8)).relay.empty


def test_a_board_has_the_table_its_legend_and_a_file(tmp_path: Path) -> None:
    table = only(answers("a", *[sent(depends=True)] * 8))
    (line,) = sections(table)["Relay"].to_dict("records")
    told = {"score": "50.0", "sent MiB": "5.000", "text MiB": "1.000", "first s": "0.500", "text first s": "1.500"}
    assert line == {"budget": "64", "method": "a", **told, "link MiB/s": "4.0", "control": "8 of 8", "n": "8"}
    text = to_markdown([table], title="t")
    assert "## Relay" in text and "messages of zeros" in text
    assert "Relay" not in to_markdown([only(cell("a", "64", [1.0] * 8))], title="t")
    paths = write_board([table], tmp_path, "board")
    (path,) = [path for path in paths if path.name == "board.relay.csv"]
    assert "link_bytes_per_s" in path.read_text()


@pytest.mark.parametrize("left_out", ["sent_bytes", "send_s"])
def test_a_record_without_a_field_is_no_record(left_out: str) -> None:
    with pytest.raises(ValueError, match=left_out):
        Relayed(**{name: value for name, value in sent().model_dump().items() if name != left_out})
