"""Rows of data sets as a stranger hands them in: taken as they stand, or refused with their file, line and field."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import load_tasks
from tasks.base import TASKS, TaskOptions
from tasks.graded.settings import PACKAGED, find_grades
from tasks.longbench import DATASETS, LongBench
from tests.hostile import tried
from tests.json_parts import HALF, damages
from tests.task_data import Options, Words, hotpot, longbench_row, squad, write_rows

load_tasks()
pytestmark = pytest.mark.hostile
BY_NAME = {dataset.name: dataset for dataset in DATASETS}
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0.5,
    10**400,
    float("nan"),
    "",
    "x" * 1000,
    HALF,
    "\0\x1b[31m",
    [],
    [[]],
    {},
    [{}],
)
"""What a field may hold that it must not."""
DEEP = "[" * 60_000 + "]" * 60_000
LOCKED: tuple[dict[str, Any], ...] = (
    {"lcc.jsonl": None},
    {"../x": {"sha256": "0" * 64, "rows": 1}},
    {"lcc.jsonl": {"sha256": "0" * 64, "rows": -1}},
    {"lcc.jsonl": {"sha256": "0" * 64, "rows": 1}},
    {"lcc.jsonl": {"sha256": "x", "rows": 1}},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def options(folder: Path) -> TaskOptions:
    return TaskOptions(tokenizer=Words(), max_tokens=4096, limit=3, lengths=(512,), data_dir=folder)


def scored(task: LongBench, folder: Path) -> None:
    """Every sample, written down and scored with an empty prediction, which must not be right."""
    for sample in task.samples(options(folder)):
        f"{sample.context}{sample.question}{sample.answers}{sample.id}".encode()
        assert task.score(sample, "")["score"] < 1


@pytest.mark.parametrize("dataset", ["hotpotqa", "lcc", "trec", "passage_retrieval_en", "dureader", "samsum"])
@pytest.mark.parametrize(
    "field", ["input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"]
)
def test_a_field_of_longbench_holds_what_it_must_or_is_named(dataset: str, field: str, tmp_path: Path) -> None:
    task, good = LongBench(BY_NAME[dataset]), longbench_row(BY_NAME[dataset])
    path = tmp_path / f"{dataset}.jsonl"
    for value in (*ODD, [HALF], ["a", 3], [""], [" \n"], ["Paragraph x"], [["x"]]):
        path.write_text(f"{json.dumps({**good, '_id': 'first'})}\n{json.dumps({**good, field: value})}\n")
        line = tried("a field of a row", lambda: scored(task, tmp_path), may_pass=True)
        assert not line or f"{dataset}.jsonl line 2" in line or "line 2" in line
        if value in (HALF, [HALF]):
            assert f"field '{field}" in line


@given(JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_place_of_a_row(tmp_path: Path, value: object) -> None:
    (tmp_path / "lcc.jsonl").write_text(json.dumps(value) + "\n")
    tried("another row", lambda: scored(LongBench(BY_NAME["lcc"]), tmp_path))


@pytest.mark.parametrize(
    "blob",
    [
        *(
            b"",
            b"\n\n",
            b"\xff\xfe\0",
            b"{",
            b"[1",
            b"NaN",
            b"1e999",
            b"\xed\xa0\x80",
            b"\0",
            DEEP.encode(),
            b"9" * 9000,
        ),
        *(b"\n" * 300_000, json.dumps({**longbench_row(BY_NAME["lcc"]), "_id": DEEP[:800]}).encode()),
        *(json.dumps(longbench_row(BY_NAME["lcc"])).encode("utf-16"), b"{}\n" * 5000, b'{"a": ' * 20_000),
    ],
)
def test_bytes_that_are_no_rows(blob: bytes, tmp_path: Path) -> None:
    for name in ("lcc.jsonl", "squad.json", "hotpot.json"):
        (tmp_path / name).write_bytes(blob)
    for task in (LongBench(BY_NAME["lcc"]), TASKS["ruler/qa_1"], TASKS["ruler/qa_2"]):
        tried("bytes as rows", lambda task=task: task.read_data(options(tmp_path)))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("made", [_pipe, _loop, _device, _huge, Path.mkdir])
def test_what_is_no_plain_file(made: Callable[[Path], Any], tmp_path: Path) -> None:
    for name in ("lcc.jsonl", "squad.json", "hotpot.json"):
        made(tmp_path / name)
    for task in (LongBench(BY_NAME["lcc"]), TASKS["ruler/qa_1"], TASKS["ruler/qa_2"]):
        tried("no plain data file", lambda task=task: task.read_data(options(tmp_path)))
    made(tmp_path / "made.json")
    tried("no plain calibration", lambda: find_grades(str(tmp_path / "made.json"), "abc"))


@pytest.mark.parametrize("name", ["none", "lcc.jsonl", "a" * 300, "a\0b", "\x1b[31m", "../../nothing", "~nobody-here"])
def test_data_folders_that_are_none(name: str, tmp_path: Path) -> None:
    write_rows(tmp_path, "lcc", [longbench_row(BY_NAME["lcc"])])
    for task in (LongBench(BY_NAME["lcc"]), TASKS["ruler/qa_1"], TASKS["multiquery/longbench"]):
        tried("no data folder", lambda task=task: task.find_data(options(tmp_path / name)))


@pytest.mark.parametrize(
    "lock",
    [
        *("", "{", "[]", "null", "NaN", DEEP, '{"files": {}}'),
        *(json.dumps({"repo": repo, "commit": "c", "files": {}}) for repo in (HALF, 3, None)),
        *(json.dumps({"repo": "r", "commit": "c", "files": files}) for files in LOCKED),
    ],
)
def test_locks_that_are_none(lock: str, tmp_path: Path) -> None:
    write_rows(tmp_path, "lcc", [longbench_row(BY_NAME["lcc"])])
    (tmp_path / "fetched.json").write_text(lock)
    tried("a damaged lock", lambda: LongBench(BY_NAME["lcc"]).read_data(options(tmp_path)))


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_a_part_of_a_question_file_is_what_it_must_be(name: str, small: Options, tmp_path: Path) -> None:
    draw = random.Random(1)
    file, good = ("squad.json", squad(draw)) if name == "qa_1" else ("hotpot.json", hotpot(draw))
    task, asked = TASKS[f"ruler/{name}"], small(data_dir=tmp_path, lengths=(512,), limit=2)
    whole = json.dumps(good, ensure_ascii=False)

    def drawn() -> None:
        task.read_data(asked)
        first = next(iter(task.samples(asked)))
        assert task.score(first, "")["score"] < 1 and f"{first}".encode()

    for _, damaged in damages(good, (..., None, 3, float("nan"), HALF, "", [], {}, [[HALF]])):
        (tmp_path / file).write_text(json.dumps(damaged))
        tried("a part of a question file", drawn, may_pass=True)
    assert json.dumps(good, ensure_ascii=False) == whole


def test_a_question_without_an_answer_is_named(small: Options, tmp_path: Path) -> None:
    for answers in ([], [{"text": ""}], [{"text": " "}]):
        made = squad(random.Random(1))
        made["data"][2]["paragraphs"][1]["qas"][0]["answers"] = answers
        (tmp_path / "squad.json").write_text(json.dumps(made))
        line = tried("no answer", lambda: TASKS["ruler/qa_1"].read_data(small(data_dir=tmp_path)))
        assert "data.2.paragraphs.1.qas.0" in line and "has no answer" in line


def test_too_few_questions_are_refused(small: Options, tmp_path: Path) -> None:
    for rows in range(4):
        (tmp_path / "hotpot.json").write_text(json.dumps(hotpot(random.Random(1), rows=rows)))
        asked = small(data_dir=tmp_path, lengths=(512,))
        tried("few questions", lambda asked=asked: list(TASKS["multiquery/qa_2"].samples(asked)))


def test_a_calibration_holds_what_it_must(tmp_path: Path) -> None:
    path = next(iter(sorted(PACKAGED.glob("*.json"))))
    good = json.loads(path.read_text())
    revision, copy = good["model_revision"], tmp_path / "made.json"
    good["rules"], good["tasks"] = good["rules"][:1], good["tasks"][:1]
    for place, damaged in damages(good, (..., None, -1, 10**400, float("nan"), True, "x" * 500, HALF, [], {})):
        if place[0] not in ("made_on", "command", "git_commit", "created"):
            copy.write_text(json.dumps(damaged))
            tried("a part of a calibration", lambda: find_grades(str(copy), revision), may_pass=True)


@given(st.binary(max_size=50))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_as_a_calibration(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bytes.json").write_bytes(data)
    tried("bytes as a calibration", lambda: find_grades(str(tmp_path / "bytes.json"), "abc"))


def test_essays_are_text(small: Options, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe no text")
    essays = small(fetch={"essays": tmp_path}.__getitem__, lengths=(512,))
    for name in ("niah/passkey", "prose/continuation", "ruler/niah_single_2"):
        tried("essays", lambda name=name: list(TASKS[name].samples(essays)))
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    for name in ("niah/passkey", "prose/continuation", "ruler/niah_single_2"):
        tried("essays", lambda name=name: list(TASKS[name].samples(replace(essays, limit=1))))
