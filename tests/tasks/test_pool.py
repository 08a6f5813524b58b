"""Drawn contexts: each prompt's own text, whatever else is asked for; its name; and a lane that is spent."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tasks import load_tasks
from tasks.base import TASKS, Sample, TaskError, TaskOptions
from tasks.pool import LANES, SEEDS, entered, pool_spans
from tests.hostile import tried
from tests.overlap import overlaps, prompt
from tests.task_data import Words, tokens

load_tasks()
DRAWING = [name for name in LANES if name != "prose/long"]  # that one needs more than a small pool has


def samples(name: str, options: TaskOptions, **changes: Any) -> list[Sample]:
    return [*TASKS[name].samples(replace(options, **changes))]


@pytest.mark.parametrize("name", DRAWING)
def test_each_context_is_its_own_text_and_named(drawn: TaskOptions, name: str) -> None:
    made = samples(name, drawn)
    assert len(made) == 5
    groups = [sample.meta["group"] for sample in made]
    asked = {"multiquery/niah": 4, "instructions/obey": 3, "instructions/secret": 2}.get(name, 1)
    assert len(set(groups)) == -(-len(made) // asked)
    most = overlaps([prompt(name, sample) for sample in made])
    assert not most or most[0].share < 0.1
    sizes = [tokens(sample, drawn.tokenizer) + sample.max_new_tokens for sample in made]
    assert all(370 <= size <= 512 for size in sizes)  # NIAH keeps 200 tokens for its own words


def test_no_two_tasks_share_text(drawn: TaskOptions) -> None:
    prompts = [prompt(name, sample) for name in DRAWING for sample in samples(name, drawn, limit=2)]
    assert all(found.share < 0.1 for found in overlaps(prompts))


@pytest.mark.parametrize("name", ["niah/kamradt", "ruler/niah_single_2", "ruler/vt", "prose/continuation"])
def test_a_sample_is_the_same_at_every_limit_and_other_under_another_seed(drawn: TaskOptions, name: str) -> None:
    made = samples(name, drawn)
    assert samples(name, drawn, limit=2) == made[:2]
    assert made == samples(name, drawn)
    other = samples(name, drawn, seed=5, limit=2)  # half of the ring further on
    assert not {sample.meta["group"] for sample in other} & {sample.meta["group"] for sample in made[:2]}


def test_a_spent_lane_refuses_in_one_line(drawn: TaskOptions) -> None:
    with pytest.raises(
        TaskError, match=r"ruler/vt: 900 samples of each length ask for \d+ tokens of text; its lane"
    ) as e:
        samples("ruler/vt", drawn, limit=900)
    assert "enough for" in str(e.value) and "--contexts protocol" in str(e.value) and "\n" not in str(e.value)


def test_without_a_limit_there_are_as_many_as_the_lane_has_text_for(drawn: TaskOptions) -> None:
    made = samples("ruler/vt", drawn, limit=None)
    assert 5 < len(made) < 500
    assert made[:5] == samples("ruler/vt", drawn)


def test_spans_are_disjoint_and_seeds_enter_a_lane_apart(drawn: TaskOptions) -> None:
    lane = pool_spans("ruler/vt", drawn, {512: 600})._sentences
    firsts = {entered(lane, seed)[0].text for seed in range(SEEDS)}
    assert len(firsts) == SEEDS and entered(lane, SEEDS)[0] == entered(lane, 0)[0]
    spans = pool_spans("ruler/vt", drawn, {256: 300, 512: 600})
    taken = [span for index in range(3) for span in (spans.at(256, index), spans.at(512, index))]
    sets = [{(one.document, one.number) for one in span.sentences} for span in taken]
    assert not any(one & other for one, other in combinations(sets, 2))


def test_a_protocol_fixes_one_context_and_says_so(drawn: TaskOptions) -> None:
    fixed = samples("ruler/niah_single_2", drawn, contexts="protocol")
    assert len({sample.meta["group"] for sample in fixed}) == 1
    said = TASKS["ruler/niah_single_2"].provenance(drawn)
    assert said["contexts"].startswith("drawn") and said["pool_entry"] == "3 of 4"
    assert "pool" not in TASKS["ruler/niah_single_2"].provenance(replace(drawn, contexts="protocol"))


def test_a_missing_text_of_the_pool_is_named(drawn: TaskOptions, tmp_path: Path) -> None:
    (tmp_path / "awsdocs").mkdir()
    with pytest.raises(TaskError, match="run `harness fetch awsdocs`"):
        samples("ruler/vt", replace(drawn, fetch=tmp_path.__truediv__))


class Letters(Words):
    """A token is a letter, so that a length holds few words."""

    pattern = r"(?s)."


@pytest.mark.parametrize("name", DRAWING)
def test_too_few_tokens_are_refused_in_a_line(drawn: TaskOptions, name: str) -> None:
    for length in (64, 400, 512, 700, 1000):
        asked = {"tokenizer": Letters(), "lengths": (length,), "limit": 2}
        tried("short contexts", lambda asked=asked: samples(name, drawn, **asked), may_pass=True)
