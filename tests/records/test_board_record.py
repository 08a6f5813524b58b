"""Records in short: the same boards, the same refusals, and only what boards need."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
import pytest

from harness.errors import HarnessError
from harness.records.board_record import SAME, BoardRecord, board_records
from harness.records.record import Record
from harness.records.run_folder import RunStore, load_board_records, load_run
from leaderboards.stats.aggregate import Table, aggregate
from tests.pretend import cell, only, row
from tests.records.test_run_folder import manifest, records_file
from tests.records.test_run_folder import record as stored

FULL = [*cell("fullkv", "full", [1.0] * 12, nll=1.0, meta={"group": "g", "depth": 5, "needles": ["x"]})]
MADE = [
    *FULL,
    *cell("a", "64", [0.5, None, *[1.0] * 10], nll=1.5, needle_tokens=4, needle_kept=((1, 2), (3, 4)), notes=("n",)),
    *cell("b", "64", [0.25] * 12, nll=0.1 + 0.2, over_budget=True),
]


def same(ours: Table, theirs: Table) -> None:
    for field in fields(Table):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(mine, pd.DataFrame):
            pd.testing.assert_frame_equal(mine, other, check_exact=True)
        else:
            assert mine == other


def store(root: Path, *lines: str) -> Path:
    with RunStore(root, manifest()) as run:
        run.append([stored(str(i), nll=i / 3, meta={"depth": i, "needles": ["x"]}) for i in range(3)])
    with records_file(root).open("a") as file:
        file.writelines(lines)
    return run.folder


def test_fields_under_the_names_of_a_record_are_what_they_are_there() -> None:
    own, theirs = get_type_hints(BoardRecord), get_type_hints(Record)
    assert len(SAME) > 15 and {name: own[name] for name in SAME} == {name: theirs[name] for name in SAME}
    short = list(board_records(MADE))
    assert [getattr(short[0], name) for name in SAME] == [getattr(MADE[0], name) for name in SAME]
    assert all(isinstance(r, BoardRecord) for r in short)
    same(only(short), only(MADE))


def test_texts_that_records_share_are_held_once() -> None:
    one, two = board_records([Record.model_validate_json(r.model_dump_json()) for r in FULL[:2]])
    for name in ("run_id", "model", "task", "method", "meta", "notes", "score"):
        assert getattr(one, name) is getattr(two, name)


def test_what_is_loaded_for_a_board_is_what_was_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backwards = damage(lambda r: dict(reversed(list(r.items()))))  # as another writer may have it
    odd = damage(lambda r: {**r, "sample_id": "10", "prediction": "\ue000"})
    again = damage(lambda r: {**r, "sample_id": "1", "nll": 9.0})
    folder = store(tmp_path, backwards, odd, again, '{"schema_version":2,"run')
    with caplog.at_level(logging.WARNING, logger="harness"):
        told, short = load_board_records(folder)
        warned = caplog.messages.copy()
        caplog.clear()
        manifest_, records = load_run(folder)
    assert warned == caplog.messages and "unfinished last line (24 bytes)" in warned[0]
    assert told == manifest_
    assert repr(short) == repr(list(board_records(records)))
    assert [r.nll for r in short] == [0.0, 9.0, 2 / 3, None, None]
    assert short[0].meta == {"group": "text 0", "depth": 0} and short[0].known


def damage(change: Callable[[dict[str, Any]], Any]) -> str:
    line = change(stored("9").model_dump(mode="json"))
    return (line if isinstance(line, str) else json.dumps(line, separators=(",", ":"))) + "\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda r: json.dumps(r)[:-5],
        lambda r: {**r, "schema_version": "2"},
        lambda r: {**r, "run_id": "elsewhere"},
        lambda r: {**r, "nll": math.nan},
        lambda r: {**r, "metrics": {"score": math.inf}},
        lambda r: {**r, "kept_slots": None},
    ],
)
def test_damage_is_refused_in_the_same_words(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    folder = store(tmp_path, damage(change), damage(lambda r: r))
    words = []
    for load in (load_run, load_board_records):
        with pytest.raises(HarnessError) as refused:
            load(folder)
        words.append(str(refused.value))
    assert words[0] == words[1] and "records.jsonl:4" in words[0]


def test_simulated_memory_is_scored_and_ranked_but_on_no_front() -> None:
    others = [*cell("fullkv", "full", [1.0] * 12), *cell("b", "64", [0.6] * 12)]
    real, pretend = (only([*others, *cell("a", "64", [0.8] * 12, memory=m)]) for m in ("physical", "simulated"))
    kinds = {"fullkv": "physical", "a": "simulated", "b": "physical"}
    assert "memory" not in real.rows and dict(zip(pretend.rows.method, pretend.rows.memory, strict=True)) == kinds
    same(real, Table(**{**vars(pretend), "rows": pretend.rows.drop(columns="memory")}))


def test_simulated_cells_put_none_off_a_front_and_physical_records_go_first() -> None:
    from tests.leaderboards.stats.test_pareto import measured  # its measured records

    made = [
        *cell("real", "64", [0.2] * 24, kv_bytes=90, measured=measured(0.02)),
        *cell("pretend", "64", [0.9] * 24, kv_bytes=10, measured=measured(0.02), memory="simulated"),
    ]
    real, pretend = (row(only(made), method, "64") for method in ("real", "pretend"))
    assert all((real[front], pretend[front]) == ("*", "") for front in ("front_bytes", "front_tpot"))
    assert pretend["rank_low"] == 1
    twice = [*made, *[r.model_copy(update={"memory": "physical", "run_id": "run2"}) for r in made[12:]]]
    assert "memory" not in only(twice).rows and len(aggregate(twice)) == 1
