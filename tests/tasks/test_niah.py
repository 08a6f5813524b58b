"""Needle in a haystack: the grid, where the needle stands, the three layouts and their scores."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer, wrap
from tasks.base import TASKS, Sample
from tasks.essays import read_essays
from tasks.niah import hide
from tests.task_data import Options, Words, draw_samples, prompt, tokens

NAMES = ["niah/snapkv", "niah/kamradt", "niah/passkey"]
CLASSIC = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
TEN = [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
DEPTHS = dict.fromkeys(NAMES, TEN) | {"niah/kamradt": np.round(np.linspace(0, 100, num=35)).astype(int).tolist()}


@pytest.fixture(scope="module")
def options(small: Options) -> Options:
    """Options over small generated essays, ten samples a length."""
    return lambda **changes: small(**{"limit": 10, "max_tokens": 20_000, **changes})


def haystack(sample: Sample) -> str:
    """The essays of a prompt, needle included."""
    frames = (("<book> ", " </book>.\n"), ("memorize it.\n", "\n"), ("direct\n\n", "\n\n"))
    start, end = next(frame for frame in frames if frame[0] in sample.context)
    return sample.context.split(start, 1)[1].removesuffix(end)


def test_the_classic_needle_is_scored_by_keywords_with_rouge_beside(options: Options) -> None:
    sample = draw_samples("niah/snapkv", options(limit=1))[0]
    score = TASKS["niah/snapkv"].score(sample, "go to the beach on a sunny day.")
    assert score["score"] == pytest.approx(4 / 11)
    assert score["rouge1"] == pytest.approx(0.414, abs=5e-4)
    assert score["rougeL"] == pytest.approx(2 * 5 / 29)  # the ... on a sunny day: 5 of 21 and of 8 words, in order
    assert TASKS["niah/snapkv"].score(sample, sample.answers[0])["rouge1"] == pytest.approx(0.727, abs=5e-4)


def test_the_passkey_is_found_exactly_or_not(options: Options) -> None:
    samples = draw_samples("niah/passkey", options())
    assert len({sample.answers for sample in samples}) == len(samples)
    for sample in samples:
        (key,) = sample.answers
        assert re.fullmatch(r"[1-9]\d{6}", key)
        assert sample.meta["needles"] == [f"The special magic number is: {key}."]
        assert TASKS["niah/passkey"].score(sample, f"It is {key}!")["score"] == 1
        assert TASKS["niah/passkey"].score(sample, f"It is {key[:-1]}")["score"] == 0


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_haystack_and_needle_leave_a_buffer_of_200_tokens(name: str, length: int, options: Options) -> None:
    chosen = options(lengths=(length,))
    for sample in draw_samples(name, chosen):
        needle = len(chosen.tokenizer.encode(f"\n{sample.meta['needles'][0]}\n"))
        text = haystack(sample).replace(f"\n{sample.meta['needles'][0]}\n", "")
        assert len(chosen.tokenizer.encode(text)) == length - 200 - needle
        prompt = tokens(sample, chosen.tokenizer)
        assert prompt + sample.max_new_tokens <= length
        assert (sample.meta["prompt_tokens"], sample.meta["length"]) == (prompt, length)


@pytest.mark.parametrize("name", ["niah/kamradt", "niah/passkey"])
def test_a_long_chat_template_gets_more_than_the_buffer(name: str, options: Options) -> None:
    for sample in draw_samples(name, options(lengths=(1024,), tokenizer=Words(template_tokens=300))):
        assert 1000 <= sample.meta["prompt_tokens"] + sample.max_new_tokens <= 1024


@pytest.mark.parametrize("name", NAMES)
def test_every_haystack_covers_all_depths(name: str, options: Options) -> None:
    samples = draw_samples(name, options(limit=None, lengths=(512,)))
    grid = DEPTHS[name]
    assert len(samples) == 5 * len(grid)
    orders = []
    for i in range(5):
        part = samples[len(grid) * i : len(grid) * (i + 1)]
        orders.append([sample.meta["depth"] for sample in part])
        assert sorted(orders[-1]) == grid
        assert all(sample.id == f"512/depth{sample.meta['depth']}/{i}" for sample in part)
    starts = {haystack(sample)[:60] for sample in samples if sample.meta["depth"] == 100}
    assert len(starts) == 5
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize("name", NAMES)
def test_the_first_depths_of_a_haystack_are_spread(name: str, options: Options) -> None:
    """Around the grid, no gap between the first four is much more than a quarter."""
    grid = DEPTHS[name]
    drawn = [s.meta["depth"] for s in draw_samples(name, options(limit=len(grid) + 4, lengths=(512,)))]
    for part in (drawn[:4], drawn[len(grid) :]):
        at = sorted(grid.index(depth) for depth in part)
        assert max((b - a) % len(grid) for a, b in zip(at, [*at[1:], at[0]], strict=True)) <= len(grid) / 4 + 1


@pytest.mark.parametrize("name", NAMES)
def test_the_needle_stands_once_after_a_sentence_near_its_depth(name: str, options: Options) -> None:
    for sample in draw_samples(name, options(lengths=(4096,))):
        assert sample.question not in sample.context
        before, after = haystack(sample).split(f"\n{sample.meta['needles'][0]}\n")
        depth = sample.meta["depth"]
        assert 100 * len(before) / len(before + after) == pytest.approx(depth, abs=1)
        assert before == "" if depth == 0 else after == "" if depth == 100 else before.endswith(".")


def test_the_snapkv_prompt_word_for_word(options: Options) -> None:
    sample = draw_samples("niah/snapkv", options(limit=1))[0]
    assert (sample.chat, sample.stop, sample.max_new_tokens) == (False, ("\n",), 30)
    assert sample.answers == ("eat a sandwich and sit in Dolores Park on a sunny day.",)
    assert prompt(sample) == (
        f"<|im_start|> This is a very long story book: <book> {haystack(sample)} </book>.\n Based on the content of "
        "the book, Question: The best thing to do in San Francisco is: \nAnswer:"
    )
    first, second = haystack(sample).split(f"\n{CLASSIC}\n")
    assert read_essays(options()).text.startswith(first + second)


def test_the_kamradt_prompt_word_for_word(options: Options) -> None:
    sample = draw_samples("niah/kamradt", options(limit=1))[0]
    assert sample.chat
    assert f"\n{CLASSIC}\n" in haystack(sample)
    assert prompt(sample) == (
        "You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n\n"
        f"{haystack(sample)}\n\nWhat is the best thing to do in San Francisco? "
        "Don't give information outside the document or repeat your findings"
    )


@settings(deadline=None)
@given(st.lists(st.sampled_from(["word", "end.", "3.14", "x"]), min_size=1, max_size=40), st.sampled_from(TEN))
def test_hiding_keeps_the_text_and_follows_the_last_full_stop(words: list[str], depth: int) -> None:
    tokenizer = Words()
    text = " ".join(words)
    ids = tokenizer.encode(text)
    before, after = hide("<N>", ids, depth, tokenizer).split("<N>")
    assert before + after == text
    head = tokenizer.decode(ids[: int(len(ids) * (depth / 100))])
    stop = max((match.end() for match in re.finditer(r"(?<=end)\.", head)), default=0)  # `3.` is one token
    assert before == (text if depth == 100 else head[:stop])


def test_the_control_token_of_the_snapkv_prompt_reaches_the_model(smollm2: LoadedModel, options: Options) -> None:
    """A tokenizer that knows `<|im_start|>` makes one token of it, as in the source; no second one is added."""
    tokenizer = TaskTokenizer(smollm2.tokenizer)
    sample = draw_samples("niah/snapkv", options(limit=1, tokenizer=tokenizer, lengths=(512,)))[0]
    wrapped = wrap(smollm2.tokenizer, sample)
    assert smollm2.tokenizer.convert_ids_to_tokens(wrapped.ids[:2]) == ["<|im_start|>", "ĠThis"]
    assert len(wrapped.ids) == sample.meta["prompt_tokens"]
    assert smollm2.tokenizer.decode(wrapped.ids[: wrapped.context]) == sample.context
