"""Long outputs: what a right, a wrong, a longer and an empty answer score, and that prompts fill their length."""

from dataclasses import replace

import pytest

from tasks import load_tasks
from tasks.base import TASKS, Sample, TaskError, TaskOptions
from tasks.long.family import GIVEN, LONGEST, ROOM, SHORTEST
from tasks.long.steps import step_metrics
from tests.task_data import Words, draw_samples

LONG = [name for name in load_tasks() if name.startswith("long/")]
OPTIONS = TaskOptions(tokenizer=Words(), max_tokens=100_000, limit=3)
REFERENCE = " Bea: key, 2\n3. Leo: wait, 2\n2. Ida: barn, 3\n1. Ben: hall, 3\n0. END"
BY_HAND = {
    "the right one": (REFERENCE, 1, 1, 1),
    "other case and marks": (" bea:  key, 2.\n3. LEO: wait, 2\n\n2. Ida: barn, 3;\n1. Ben: hall, 3\n0. end.", 1, 1, 1),
    "nothing": ("", 0, 0, 0),
    "no end": (REFERENCE[:-7], 1, 1, 0),
    "on after the end": (f"{REFERENCE}\n0. Ben", 1, 1, 0),
    "one wrong step": (REFERENCE.replace("wait", "goes"), 1 / 4, 3 / 4, 1),
    "one left out": (REFERENCE.replace("3. Leo: wait, 2\n", ""), 1 / 4, 3 / 4, 1),
    "one said twice": (REFERENCE.replace("2. Ida", "3. Leo: wait, 2\n2. Ida"), 2 / 4, 1, 1),
    "a guess put right": (REFERENCE.replace("2. Ida", "2. Ben: barn, 3\n2. Ida"), 2 / 4, 3 / 4, 1),
    "the end at once": ("\n0. END", 0, 0, 1),
    "the first wrong": (f" Eve{REFERENCE}", 0, 3 / 4, 1),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_metrics_are_those_by_hand(case: str) -> None:
    said, score, right, ended = BY_HAND[case]
    assert step_metrics(said, REFERENCE) == {"score": score, "right": right, "ended": ended}


def following(sample: Sample) -> list[str]:
    """All lines of the answer, those given first."""
    return f"{sample.answer_prefix}{sample.answers[0]}".split("\n")


@pytest.mark.parametrize("name", LONG)
def test_gold_answers_are_right_and_prompts_fill_their_length(name: str) -> None:
    encode = OPTIONS.tokenizer.encode
    for sample in draw_samples(name, replace(OPTIONS, lengths=(1024, 2048))):
        task, gold, length = TASKS[name], sample.answers[0], sample.meta["length"]
        assert set(task.score(sample, gold).values()) == {1.0} and set(task.score(sample, "").values()) == {0.0}
        cut = gold.split("\n")
        cut[4] = "x"
        steps = len(cut) - 1
        assert dict(task.score(sample, "\n".join(cut))) == {"score": 4 / steps, "right": 1 - 1 / steps, "ended": 1}
        assert SHORTEST <= len(encode(gold)) <= LONGEST and sample.max_new_tokens >= 1.7 * len(encode(gold))
        prompt = len(encode(sample.context + sample.question + sample.answer_prefix))
        assert 0.9 * length < prompt + sample.max_new_tokens < length
        assert sample.meta["steps"] == steps == len(following(sample)) - 1 - GIVEN


@pytest.mark.parametrize("name", LONG)
def test_every_sample_is_a_context_of_its_own_whatever_the_limit(name: str) -> None:
    samples = draw_samples(name, replace(OPTIONS, lengths=(1024, 2048)))
    assert len({one.meta["group"] for one in samples}) == len({one.context for one in samples}) == len(samples) == 6
    assert draw_samples(name, replace(OPTIONS, limit=1))[0] == samples[0]
    assert draw_samples(name, replace(OPTIONS, limit=1, seed=1))[0].context != samples[0].context


@pytest.mark.parametrize("name", LONG)
def test_an_answer_stays_below_its_longest_however_long_the_prompt(name: str) -> None:
    (sample,) = draw_samples(name, replace(OPTIONS, lengths=(8192,), limit=1))
    wanted = len(OPTIONS.tokenizer.encode(sample.answers[0]))
    assert 0.95 * LONGEST < wanted <= LONGEST and sample.max_new_tokens <= ROOM * LONGEST + ROOM * 8
    assert len(sample.context.split("\n")) > 2 * sample.meta["steps"]


@pytest.mark.parametrize("name", LONG)
def test_a_length_without_room_for_a_long_answer_is_refused_with_one_that_works(name: str) -> None:
    with pytest.raises(TaskError, match="256 tokens leave no room for an answer of 256; ask for at least") as refused:
        draw_samples(name, replace(OPTIONS, lengths=(256,)))
    assert draw_samples(name, replace(OPTIONS, lengths=(int(str(refused.value).split()[-1]),)))
    with pytest.raises(TaskError, match="exceeds the 1000 tokens of the run"):
        draw_samples(name, replace(OPTIONS, max_tokens=1000))


def rows(sample: Sample) -> list[tuple[str, str]]:
    """What stands behind the number of each line of the prompt, and of the answer's line of the same number."""
    listed, answer = (lines.split("\n") for lines in (sample.context, "\n".join(following(sample))))
    known = dict(line.split(". ", 1) for line in listed if ". " in line and line[0].isdigit())
    return [(known[number], text) for number, text in (line.split(". ", 1) for line in answer[:-1])]


def test_tables_share_their_rule() -> None:
    for sample in draw_samples("long/table", OPTIONS):
        shown, wanted = (table.split(", ") for table in rows(sample)[0])
        assert shown[:2] == wanted[:2] and shown[2] != wanted[2]
        for (fruit, colour, name), (other, tint, owner) in ((a.split(", "), b.split(", ")) for a, b in rows(sample)):
            assert (fruit, colour, name, owner) == (other, tint, shown[2], wanted[2])


def test_lists_are_copied() -> None:
    assert all(shown == wanted for sample in draw_samples("long/list", OPTIONS) for shown, wanted in rows(sample))


def test_sums_count_the_apples() -> None:
    for sample in draw_samples("long/sums", OPTIONS):
        count = 0
        for shown, wanted in rows(sample):
            more = int(shown[-1])
            assert wanted == f"{shown}, {count} + {more} = {count + more}"
            count += more


def test_a_box_stays_where_it_was_last_carried() -> None:
    for sample in draw_samples("long/state", OPTIONS):
        place = ""
        for shown, wanted in rows(sample):
            place = place if shown.endswith(": wait") else shown.split(": ")[1]
            assert wanted == f"{shown}, at {place}"
