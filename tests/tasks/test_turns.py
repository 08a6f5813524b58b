"""Conversations: what is hidden, told and asked for, and how each turn is scored."""

from dataclasses import replace

import pytest

from tasks.base import TASKS, Sample, TaskError, TaskOptions
from tasks.turns import GENERATION, HIDDEN, TOLD, TURNS
from tests.task_data import draw_samples, prompt, tokens

FACTS, SECOND = "turns/facts", "turns/told"


def messages(sample: Sample) -> list[str]:
    return [sample.question, *(turn.question for turn in sample.turns)]


def told_by(message: str) -> str:
    """The fact that a message tells besides its question."""
    return message.splitlines()[0].removeprefix(f"{TOLD} ") if message.startswith(TOLD) else ""


@pytest.mark.parametrize("name", [FACTS, SECOND])
def test_every_answer_was_said_before_it_is_asked_for(name: str, drawn: TaskOptions) -> None:
    for sample in draw_samples(name, replace(drawn, limit=12, lengths=(320,))):
        heads = [sample.answer_prefix, *(turn.answer_prefix for turn in sample.turns)]
        assert len(heads) == len(sample.answers) == len(sample.meta["sources"]) == TURNS and len(set(heads)) == TURNS
        said = list[str]()
        for head, answer, source, message in zip(
            heads, sample.answers, sample.meta["sources"], messages(sample), strict=True
        ):
            fact = f"{head} {answer}."
            assert (fact in sample.context.splitlines()) == (source == "context")
            assert (fact in said) == (source == "told")
            assert answer not in message.splitlines()[-1] and message.splitlines()[-1].startswith("Question: ")
            said.append(told_by(message))
        assert sample.meta["needles"] == [line for line in sample.meta["needles"] if line in sample.context]
        assert len(sample.meta["needles"]) == sample.meta["sources"].count("context")
        assert len({*said} - {""}) == (TURNS if name == SECOND else 0)


def test_the_told_are_asked_for_at_every_later_turn(drawn: TaskOptions) -> None:
    sources = [sample.meta["sources"] for sample in draw_samples(SECOND, replace(drawn, limit=12, lengths=(320,)))]
    assert all(own[0] == "context" and own.count("told") == 2 for own in sources)
    assert all({own[turn] for own in sources} == {"context", "told"} for turn in range(1, TURNS))


@pytest.mark.parametrize("name", [FACTS, SECOND])
def test_a_context_hides_its_facts_in_a_text_of_its_own_that_fills_the_length(name: str, drawn: TaskOptions) -> None:
    options = replace(drawn, lengths=(400, 700), limit=2)
    samples = draw_samples(name, options)
    assert len({sample.meta["group"] for sample in samples}) == 4
    for sample in samples:
        used = tokens(sample, options.tokenizer) + sample.max_new_tokens
        assert 0.93 * sample.meta["length"] < used <= sample.meta["length"]
        alone = [line for line in sample.context.splitlines() if len(line.split()) < 10]
        assert len(alone) >= HIDDEN and sample.id.startswith(f"{sample.meta['length']}/")


@pytest.mark.parametrize("name", [FACTS, SECOND])
def test_both_protocols_have_the_same_samples(name: str, drawn: TaskOptions) -> None:
    again = TASKS[name.replace("turns/", "turns/again/")]
    assert (TASKS[name].again, again.again) == (False, True)
    assert (TASKS[name].protocol, again.protocol) == ("turns", "turns/again")
    assert draw_samples(again.name, drawn) == draw_samples(name, drawn)
    assert again.provenance(drawn) == TASKS[name].provenance(drawn)
    other = draw_samples(name, replace(drawn, seed=4))
    assert not {prompt(sample) for sample in other} & {prompt(sample) for sample in draw_samples(name, drawn)}


def test_each_turn_is_scored_by_its_own_line(drawn: TaskOptions) -> None:
    task = TASKS[SECOND]
    sample = replace(
        draw_samples(SECOND, drawn)[0],
        answers=("attic", "1234", "Oslo", "red", "plum"),
        meta={"sources": ["context", "told", "context", "context", "told"]},
    )

    def scored(said: str) -> dict[str, float]:
        return dict(task.score(sample, said))

    right = scored(" the attic.\n1234\n Oslo, as told\nRed\n plum")
    assert set(right.values()) == {1.0}
    assert list(right) == ["score", "turn1", "turn2", "turn3", "turn4", "turn5", "context", "told"]
    part = scored("\n1234.\nin Oslo\n blue red\nplums")
    assert [part[f"turn{n}"] for n in range(1, 6)] == [0, 1, 0, 0, 0]
    assert (part["score"], part["context"], part["told"]) == (0.2, 0.0, 0.5)
    assert scored("1234")["score"] == scored("\n\n\n\n")["score"] == 0  # the right answer to another turn
    assert scored("attic")["score"] == 0.2


def test_every_answer_fits_what_may_be_generated(drawn: TaskOptions) -> None:
    for sample in draw_samples(SECOND, replace(drawn, limit=12, lengths=(320,))):
        assert [sample.max_new_tokens, *(turn.max_new_tokens for turn in sample.turns)] == [GENERATION] * TURNS
        assert sample.stop == ("\n",)


def test_a_length_without_room_for_a_text_names_the_least_one(drawn: TaskOptions) -> None:
    with pytest.raises(TaskError, match=r"turns/told: 96 tokens are too few; the smallest .* is \d+$") as caught:
        draw_samples(SECOND, replace(drawn, lengths=(96,)))
    least = int(str(caught.value).split()[-1])
    assert draw_samples(SECOND, replace(drawn, lengths=(least,), limit=2))
