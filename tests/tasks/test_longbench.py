"""LongBench: prompts against official checksums, truncation against a naive loop, and damaged files."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks import longbench
from tasks.base import Sample, TaskError, TaskOptions, find_tasks
from tasks.longbench import DATASETS, Dataset, LongBench, cut_middle, longest_prompt, official_template
from tests.task_data import Words, read_rows, write_rows
from tests.task_data import longbench_row as row

BY_NAME = {dataset.name: dataset for dataset in DATASETS}


class Blanks(Words):
    """A token is a word, a blank or a mark."""

    pattern = r"\w+|\s|[^\w\s]"


def options(folder: Path | None = None, **changes: Any) -> TaskOptions:
    return replace(TaskOptions(tokenizer=Blanks(7), max_tokens=10**9, data_dir=folder), **changes)


def samples(dataset: Dataset, asked: TaskOptions) -> list[Sample]:
    return list(LongBench(dataset).samples(asked))


def made(folder: Path, name: str, *changes: dict[str, Any], **asked: Any) -> list[Sample]:
    """Samples of made rows, one for each set of changes."""
    write_rows(folder, name, [row(BY_NAME[name], number, **own) for number, own in enumerate(changes)])
    return samples(BY_NAME[name], options(folder, **asked))


def test_every_task_says_what_it_is() -> None:
    """Counts of THUDM/LongBench's task.md: 4750 rows of LongBench, 3668 of LongBench-E."""
    official, by_length = find_tasks(["longbench"]), find_tasks(["longbench_e"])
    assert official == find_tasks(["longbench/official"])
    assert (len(official), len(by_length)) == (len(DATASETS), 13) == (21, 13)
    assert {task.protocol for task in official} == {"official"}
    assert [sum(task.about.samples for task in tasks) for tasks in (official, by_length)] == [4750, 3668]
    assert {d.name for d in DATASETS if not d.chat} == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {d.name for d in DATASETS if d.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    about = {task.name: task.about for task in (*official, *by_length)}
    assert {(a.source, a.revision, a.licence) for a in about.values()} == {("THUDM/LongBench", "2e00731", "MIT")}
    counts = {"longbench/lcc": 500, "longbench_e/multi_news": 294, "longbench_e/qasper": 224}
    assert {name: about[name].samples for name in counts} == counts
    assert (about["longbench/trec"].metric, about["longbench/vcsum"].metric) == ("classification", "rouge_l_zh")


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.name)
def test_every_real_row_renders_to_the_official_prompt(dataset: Dataset, shared_data: Path) -> None:
    checksums = json.loads((shared_data / "longbench_prompt_sha256.json").read_text(encoding="utf-8"))
    rows, drawn = read_rows(shared_data, dataset.name), samples(dataset, options(shared_data))
    assert [sample.id for sample in drawn] == [r["_id"] for r in rows]
    for sample, official in zip(drawn, rows, strict=True):
        prompt = sample.context + sample.question + sample.answer_prefix
        assert hashlib.sha256(prompt.encode()).hexdigest() == checksums[sample.id]["sha256"], sample.id
        assert sample.context.endswith(official["context"])
        assert sample.meta["truncated"] is False
        assert sample.answers == tuple(official["answers"])


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.name)
def test_a_made_row_scores_from_its_stored_record(dataset: Dataset, by_length: bool, tmp_path: Path) -> None:
    task = LongBench(dataset, by_length=by_length)
    write_rows(tmp_path, task.file.removesuffix(".jsonl"), [row(dataset)])
    (sample,) = task.samples(options(tmp_path))
    kept = json.loads(json.dumps({"meta": dict(sample.meta), "answers": sample.answers}))
    stored = Sample("s", "", "", tuple(kept["answers"]), dataset.max_new_tokens, meta=kept["meta"])
    assert task.score(stored, stored.answers[0])["score"] == pytest.approx(1.0, abs=1e-6)
    assert task.score(stored, "")["score"] == 0.0
    assert (sample.chat, sample.max_new_tokens) == (dataset.chat, dataset.max_new_tokens)
    assert (sample.meta.get("length_bin") == "0-4k") is by_length


def test_few_shot_answers_are_scored_by_their_first_line_and_the_best_reference() -> None:
    trec, hotpot = LongBench(BY_NAME["trec"]), LongBench(BY_NAME["hotpotqa"])
    city = Sample("s", "", "", ("City",), 64, meta={"all_classes": ["City", "Person"]})
    assert [trec.score(city, said)["score"] for said in ("\nCity\nPerson", "Person\nCity")] == [1.0, 0.0]
    york = Sample("s", "", "", ("no", "New York"), 32)
    assert hotpot.score(york, "new york\nor not")["score"] == pytest.approx(2 / 3)


def test_samsum_ends_at_the_token_of_a_newline_after_one_token(tmp_path: Path) -> None:
    (sample,) = made(tmp_path, "samsum", {})
    assert (sample.stop, sample.end_tokens, sample.min_new_tokens, sample.chat) == ((), ("\n",), 1, False)


def test_samsum_scores_the_first_line_behind_blank_ones(tmp_path: Path) -> None:
    """A token of two line breaks ends nothing in pred.py, and eval.py drops them before it takes a line."""
    (sample,) = made(tmp_path, "samsum", {"answers": ["Ann bakes cakes."]})
    for said in ("\n\nAnn bakes cakes.", "Ann bakes cakes.\n\nBen: more", "\nAnn bakes cakes.\nand"):
        assert LongBench(BY_NAME["samsum"]).score(sample, said)["score"] == pytest.approx(1.0)


def test_placeholders_in_the_data_are_left_alone(tmp_path: Path) -> None:
    (sample,) = made(tmp_path, "qasper", {"context": "a {input} b {context}", "input": "{context}?"})
    assert sample.context.endswith("Article: a {input} b {context}")
    assert "Question: {context}?" in sample.question


def test_another_template_or_no_lm_eval_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tasks" / "longbench"
    folder.mkdir(parents=True)
    (folder / "qasper.yaml").write_text('process_results: !function m.f\ndoc_to_text: "{{context}} {{question}}"\n')
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(longbench, "find_spec", lambda name: found)
    with pytest.raises(TaskError, match=r"not the official one; install lm_eval==0\.4\.13"):
        official_template.__wrapped__(BY_NAME["qasper"])
    with pytest.raises(TaskError, match=r"has no prompt of longbench/trec; install lm_eval==0\.4\.13"):
        official_template.__wrapped__(BY_NAME["trec"])
    monkeypatch.setattr(longbench, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match="not installed"):
        official_template.__wrapped__(BY_NAME["trec"])


@pytest.mark.parametrize(
    ("name", "expected"), [("qasper", (3596, 3961)), ("gov_report", (3577, 3577)), ("lcc", (3596, 4031))]
)
def test_longest_prompt(name: str, expected: tuple[int, int]) -> None:
    """4096 - 500, or what generation and the template of 7 tokens leave; without a template one token is kept free."""
    assert longest_prompt(options(max_tokens=4096), BY_NAME[name]) == expected


def test_the_cut_worked_out_by_hand() -> None:
    """507 - 500 = 7 of 19 tokens (ten letters, nine blanks): int(7 / 2) = 3 from either end."""
    opts = options(max_tokens=507)
    assert cut_middle("a b c d e f g h ", "i j", options=opts, dataset=BY_NAME["trec"]) == ("a b", "i j", True)
    assert cut_middle("a b c d e f g h i ", "j", options=opts, dataset=BY_NAME["trec"]) == ("a bi ", "j", True)
    assert cut_middle("a ", "b c d e f g h i j", options=opts, dataset=BY_NAME["trec"]) == ("a ", "bi j", True)
    assert cut_middle("a b c ", "d", options=opts, dataset=BY_NAME["trec"]) == ("a b c ", "d", False)


words = st.lists(st.sampled_from(["alpha", "beta", "gamma", " ", "\n", "."]), min_size=1, max_size=300).map("".join)


@settings(max_examples=60, deadline=None)
@given(words, words, st.integers(503, 900))
@example("alpha  alpha ", " alpha alpha", 508)  # what is left begins with the context by chance
def test_cutting_keeps_the_first_and_last_half_and_finds_the_border(context: str, question: str, most: int) -> None:
    opts, dataset = options(max_tokens=most), BY_NAME["trec"]
    length, room = longest_prompt(opts, dataset)
    ids = opts.tokenizer.encode(context + question)
    before, after, truncated = cut_middle(context, question, options=opts, dataset=dataset)
    assert truncated is (len(ids) > length)
    if not truncated:
        assert (before, after) == (context, question)
        return
    half = int(length / 2)
    assert before + after == opts.tokenizer.decode(ids[:half]) + opts.tokenizer.decode(ids[len(ids) - half :])
    assert len(opts.tokenizer.encode(before + after)) <= room
    survived = len(opts.tokenizer.decode(ids[len(ids) - half :])) >= len(question)
    assert question.endswith(after) or before == context
    assert after == question or not survived


def test_a_cut_that_encodes_to_more_tokens_is_cut_shorter() -> None:
    class Growing(Blanks):
        """Joining the halves costs 40 tokens, once."""

        def encode(self, text: str) -> list[int]:
            ids = super().encode(text)
            return ids if text == whole else ids + [0] * 40

    whole = "word " * 3000 + "?"
    opts = options(max_tokens=2000, tokenizer=Growing(7))
    before, after, truncated = cut_middle(whole[:-1], "?", options=opts, dataset=BY_NAME["gov_report"])
    _, room = longest_prompt(opts, BY_NAME["gov_report"])
    assert truncated
    assert after == "?"
    assert room - 2 <= len(opts.tokenizer.encode(before + after)) <= room


def test_no_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(TaskError, match=r"512 generated ones.*raise max_tokens"):
        cut_middle("text " * 9, "?", options=options(max_tokens=512), dataset=BY_NAME["gov_report"])


def test_a_limit_draws_a_seeded_subset(tmp_path: Path) -> None:
    rows = [{}] * 30
    few, again, more, other = (
        [sample.id for sample in made(tmp_path / "longbench", "qasper", *rows, data_dir=tmp_path, **asked)]
        for asked in ({"limit": 5}, {"limit": 5}, {"limit": 12}, {"limit": 5, "seed": 1})
    )
    assert few == again != other
    assert set(few) < set(more)


def test_a_limit_is_spread_over_the_lengths(tmp_path: Path) -> None:
    """Of 40 rows, whatever their order, 8 are drawn: 2 of each quarter by length."""
    lengths = [{"length": (7 * n) % 40} for n in range(40)]
    for seed in range(5):
        drawn = made(tmp_path, "qasper", *lengths, limit=8, seed=seed)
        assert sorted(sample.meta["length"] // 10 for sample in drawn) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_whole_leaves_out_rows_that_would_be_cut(tmp_path: Path) -> None:
    rows = [{"context": "word " * (20 if number % 2 else 3000)} for number in range(6)]
    assert sum(sample.meta["truncated"] for sample in made(tmp_path, "qasper", *rows, max_tokens=1500)) == 3
    whole = made(tmp_path, "qasper", *rows, max_tokens=1500, whole=True)
    assert [sample.id for sample in whole] == ["id1", "id3", "id5"]
    with pytest.raises(TaskError, match=r"no row of qasper.jsonl fits 1500 tokens uncut"):
        made(tmp_path, "qasper", *rows[::2], max_tokens=1500, whole=True)


def test_rows_of_one_context_share_a_group(tmp_path: Path) -> None:
    rows = ({"context": text} for text in ("one", "two", "one"))
    first, second, third = (sample.meta["group"] for sample in made(tmp_path, "qasper", *rows))
    assert first == third != second


def test_an_official_row_of_no_words_is_kept_and_one_without_an_id_named_by_its_line(tmp_path: Path) -> None:
    (sample,) = made(tmp_path, "multi_news", {"context": "", "length": 0})
    assert sample.context.endswith("News:\n")
    assert [sample.id for sample in made(tmp_path, "qasper", {"_id": None}, {"_id": ""})] == ["line-1", "line-2"]


def damaged(**changes: Any) -> str:
    changed = row(BY_NAME["trec"], 1) | changes
    return json.dumps({key: value for key, value in changed.items() if value != "gone"})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"input": "cut off', "trec.jsonl line 2 is not JSON"),
        ("[1]", "line 2 is damaged: Input should be a valid dictionary or instance of"),
        (damaged(context="gone"), "line 2 is damaged: field 'context': Field required"),
        (damaged(length="12"), "line 2 is damaged: field 'length': Input should be a valid integer, got '12'"),
        (damaged(answers=[]), "line 2 is damaged: field 'answers': no reference that is not blank"),
        (damaged(all_classes=None), "line 2 is damaged: field 'all_classes': Input should be a valid tuple, got None"),
        (damaged(dataset="qasper"), "line 2: a row of 'qasper' in the file of 'trec'"),
        (damaged(context=""), "line 2 is damaged: field 'context' is empty, length is 10"),
        (damaged(_id="id0"), "line 2: _id 'id0' is in the file twice"),
    ],
)
def test_a_damaged_line_is_named(second: str, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path, "trec", [row(BY_NAME["trec"])])
    path.write_text(path.read_text() + second + "\n")
    with pytest.raises(TaskError, match=re.escape(message)):
        samples(BY_NAME["trec"], options(tmp_path))


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no lcc_e\.jsonl in .*longbench; .*`harness data fetch longbench --to "):
        list(LongBench(BY_NAME["lcc"], by_length=True).samples(options(tmp_path)))
    with pytest.raises(TaskError, match=r"lcc\.jsonl is empty"):
        made(tmp_path, "lcc")


def test_provenance_names_file_checksum_and_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path, "lcc", [row(BY_NAME["lcc"])])
    said = LongBench(BY_NAME["lcc"]).provenance(options(tmp_path))
    assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (said["rows"], said["official_rows"]) == (1, 500)
    assert (said["data"], said["data_revision"]) == ("data_dir", None)
    assert len(said["deviations"]) == 3
    assert said["template_source"].startswith("lm-eval 0.4.")
    assert str(tmp_path) not in json.dumps(said)


def locked(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A data file as `harness data fetch` leaves it: beside a lock."""
    path = write_rows(tmp_path, "lcc", [row(BY_NAME["lcc"])])
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "rows": 1}
    lock = {"repo": "THUDM/LongBench", "commit": "5e628be", "files": {"lcc.jsonl": entry}}
    (tmp_path / "fetched.json").write_text(json.dumps(lock))
    return path, lock


def test_fetched_files_are_found_through_the_asset_and_say_their_commit(tmp_path: Path) -> None:
    locked(tmp_path)
    asked = options(fetch={"longbench": tmp_path}.__getitem__)
    assert len(samples(BY_NAME["lcc"], asked)) == 1
    said = LongBench(BY_NAME["lcc"]).provenance(asked)
    assert (said["data"], said["data_revision"]) == ("THUDM/LongBench", "5e628be")
    says = r"no trec\.jsonl in .*delete that folder and run `harness data fetch longbench`"
    with pytest.raises(TaskError, match=says):
        samples(BY_NAME["trec"], asked)


def test_a_file_that_is_not_the_fetched_one_is_refused(tmp_path: Path) -> None:
    path, lock = locked(tmp_path)
    write_rows(tmp_path, "trec", [row(BY_NAME["trec"])])  # beside them, but not of them
    assert LongBench(BY_NAME["trec"]).provenance(options(tmp_path))["data"] == "data_dir"
    path.write_bytes(path.read_bytes() + b"\n")
    says = rf"lcc\.jsonl has sha256 .*{lock['files']['lcc.jsonl']['sha256'][:12]} was fetch"
    with pytest.raises(TaskError, match=says):
        samples(BY_NAME["lcc"], options(tmp_path))
    for damage in ("{", "[]", '{"files": 1}', '{"files": {"lcc.jsonl": {"sha256": "x"}}}'):
        (tmp_path / "fetched.json").write_text(damage)
        with pytest.raises(TaskError, match=r"fetched\.json is (damaged|not JSON)"):
            samples(BY_NAME["lcc"], options(tmp_path))
