"""Continuations of essays: spans that fit, references that follow them, places that take turns, and refusals."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer, answer_tokens, wrap
from tasks.base import TASKS, Sample, TaskError, TaskOptions
from tasks.prose import open_essays
from tests.task_data import Options, Words, draw_samples, prompt

CONTINUATION, LONG = NAMES = ("prose/continuation", "prose/long")
GENERATION = {CONTINUATION: 64, LONG: 512}
each_task = pytest.mark.parametrize("name", NAMES)


class Merging(Words):
    """Every text begins with a token of its own, and `, ` followed by a short word is one: counts do not add up."""

    pattern = r",\s\w{1,5}\b|" + Words.pattern

    def encode(self, text: str) -> list[int]:
        return [self._ids.setdefault("", len(self._ids)), *super().encode(text)]


@pytest.fixture(scope="module")
def options(longer: Options) -> Options:
    """Twelve samples a length."""
    return lambda **changes: longer(**{"limit": 12, **changes})


@pytest.fixture(scope="module")
def real(options: Options, essays_folder: Path) -> Options:
    return lambda **changes: options(**{"lengths": (1024, 4096), "fetch": lambda _: essays_folder, **changes})


def check(name: str, samples: Sequence[Sample], chosen: TaskOptions) -> None:
    """What every sample is, whatever the length, the essays and the tokenizer."""
    essays = {essay.name: essay for essay in open_essays(chosen)}
    for sample in samples:
        essay, end = essays[sample.meta["essay"]], len(prompt(sample)) - 1
        used = 1 + len(chosen.tokenizer.encode(prompt(sample))) + sample.max_new_tokens
        assert used <= sample.meta["length"]
        assert used - 1 >= 0.9 * sample.meta["length"]
        assert sample.meta["prompt_tokens"] == used - 1 - GENERATION[name]
        text = f"{prompt(sample)} {sample.answers[0]} "
        assert essay.text.count(text) == 1
        begin = essay.text.index(text)
        first = essay.borders.index(begin)  # a whole sentence begins, and one ends before the last blank
        assert first == sample.meta["sentence"]
        last = essay.borders.index(begin + end + 2)
        assert sample.question == " " + essay.span(last - 2, last)
        assert last - first > 2
        if first:
            longer = 1 + len(chosen.tokenizer.encode(essay.span(first - 1, last))) + GENERATION[name]
            assert longer > sample.meta["length"]
        rest = essay.text[begin + len(text) :].split(" ", 1)[0]
        assert len(chosen.tokenizer.encode(f" {sample.answers[0]}")) <= GENERATION[name]
        assert len(chosen.tokenizer.encode(f" {sample.answers[0]} {rest}")) > GENERATION[name]


@each_task
def test_raw_prompts_a_generation_that_cannot_end_early_and_its_score(name: str, options: Options) -> None:
    for sample in draw_samples(name, options(lengths=(1200,))):
        assert (sample.chat, sample.stop, sample.answer_prefix) == (False, (), "")
        assert sample.max_new_tokens == GENERATION[name]
        assert sample.min_new_tokens == (512 if name == LONG else 0)
        gold = sample.answers[0]
        assert 0.3 < TASKS[name].score(sample, gold[: len(gold) // 3])["score"] < 0.97
        assert TASKS[name].score(sample, "Nothing of that kind is said.")["score"] == 0


@pytest.mark.parametrize("tokenizer", [Words(template_tokens=300), Merging()])
@each_task
def test_whole_sentences_fill_the_length_and_the_reference_follows(
    name: str, tokenizer: Words, options: Options
) -> None:
    asked = options(tokenizer=tokenizer, lengths=(1200, 2000), limit=6)
    samples = draw_samples(name, asked)
    assert [sample.id for sample in samples] == [f"{length}/{i}" for length in (1200, 2000) for i in range(6)]
    check(name, samples, asked)


@settings(max_examples=8, deadline=None)
@given(length=st.integers(700, 4000), seed=st.integers(0, 3))
def test_any_length_fits(length: int, seed: int, options: Options) -> None:
    asked = options(lengths=(length,), seed=seed, limit=2)
    for name in NAMES:
        samples = draw_samples(name, asked)
        assert len(samples) == 2
        check(name, samples, asked)


@each_task
def test_essays_take_turns_and_places_are_used_once(name: str, options: Options) -> None:
    samples = draw_samples(name, options(lengths=(1200,), limit=None))
    assert len({prompt(sample) for sample in samples}) == len(samples) == 100
    groups = [sample.meta["group"] for sample in samples]
    assert groups == [sample.meta["essay"] for sample in samples]
    used = set(groups)
    assert used == {"short.txt", "middle.txt", "long.txt", "saga.txt"}  # the brief one is shorter than that
    assert set(groups[: len(used)]) == used
    shares = [groups.count(f"{essay}.txt") for essay in ("short", "middle", "long", "saga")]
    assert shares == sorted(shares)  # the more room, the more turns
    if name == LONG:  # a short one has room for three references of 512 tokens
        assert shares[-1] > 3 * shares[0]


@each_task
def test_the_first_references_of_an_essay_are_apart(name: str, options: Options) -> None:
    (saga,) = (essay for essay in open_essays(options()) if essay.name == "saga.txt")
    samples = [s for s in draw_samples(name, options(lengths=(1200,), limit=16)) if s.meta["group"] == "saga.txt"]
    spans = sorted((saga.text.index(f" {s.answers[0]} "), len(s.answers[0])) for s in samples)
    assert len(spans) == 4
    assert all(a + size < b for (a, size), (b, _) in pairwise(spans))


def test_fewer_places_than_asked_for_are_fewer_samples(options: Options) -> None:
    samples = draw_samples(CONTINUATION, options(lengths=(10_000,), limit=1000))
    assert 1 < len(samples) < 1000
    assert {sample.meta["essay"] for sample in samples} == {"saga.txt"}


@each_task
def test_a_length_beyond_every_essay_names_the_longest(name: str, options: Options) -> None:
    with pytest.raises(TaskError, match=f"{name}: no essay has 50000 tokens.*longest length available is") as error:
        TASKS[name].samples(options(lengths=(1200, 50_000)))
    assert "\n" not in str(error.value)
    longest = int(str(error.value).rsplit(" ", 1)[1])
    (sample,) = draw_samples(name, options(lengths=(longest,), limit=1))
    assert sample.meta["sentence"] == 0
    assert sample.meta["prompt_tokens"] + GENERATION[name] + 1 == longest
    with pytest.raises(TaskError, match=f"no essay has {longest + 1} tokens"):
        TASKS[name].samples(options(lengths=(longest + 1,)))


@each_task
def test_a_length_that_is_too_small_is_refused(name: str, options: Options) -> None:
    with pytest.raises(TaskError, match=f"fill 90 % of 64 tokens, of which the generation takes {GENERATION[name]}"):
        TASKS[name].samples(options(lengths=(64,)))


def test_an_essay_is_one_line_and_footnotes_stay_with_their_sentence(tmp_path: Path, options: Options) -> None:
    (tmp_path / "b.txt").write_text("Mr. Mo  is\ngood.[2] So is he.\n\n  He said so!", encoding="utf-8")
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    (essay,) = open_essays(options(fetch=lambda _: tmp_path))
    assert essay.name == "b.txt"
    assert essay.text == "Mr. Mo is good.[2] So is he. He said so!"
    assert [essay.span(i, i + 1) for i in range(2)] == ["Mr. Mo is good.[2] So is he.", "He said so!"]
    assert essay.span(0, 2) == essay.text


@each_task
def test_the_real_essays(name: str, real: Options) -> None:
    asked = real(limit=20)
    samples = draw_samples(name, asked)
    assert len(samples) == 40
    check(name, samples, asked)
    assert [len({s.meta["group"] for s in part}) for part in (samples[:20], samples[20:])] > [19, 9]


@each_task
def test_the_model_sees_the_reference_as_it_follows(name: str, smollm2: LoadedModel, real: Options) -> None:
    """Prompt and reference are the tokens of the text in one piece, and the question is no part of the context."""
    raw = smollm2.tokenizer
    for sample in draw_samples(name, real(limit=3, tokenizer=TaskTokenizer(raw))):
        wrapped = wrap(raw, sample)
        answer = answer_tokens(raw, wrapped, sample.answers[0], limit=1000)
        assert 0.9 * sample.meta["length"] <= len(wrapped.ids) + GENERATION[name] < sample.meta["length"]
        assert GENERATION[name] - 12 <= len(answer) <= GENERATION[name]
        assert raw.decode(wrapped.ids[: wrapped.context]) == sample.context
        together = raw(f"{prompt(sample)} {sample.answers[0]}", add_special_tokens=False)["input_ids"]
        assert wrapped.ids + answer == together
