"""Needle in a haystack: the grid, where the needle stands, the three layouts and their scores."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer, wrap
from tasks.base import TASKS, Sample, TaskError, find_tasks
from tasks.essays import read_essays
from tasks.niah import hide
from tests.task_data import Options, Words, draw_samples

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
    if "<book>" in sample.context:
        start, end = "<book> ", " </book>.\n"
    elif "magic" in sample.context:
        start, end = "memorize it.\n", "\n"
    else:
        start, end = "direct\n\n", "\n\n"
    return sample.context.split(start, 1)[1].removesuffix(end)


def test_the_family_is_three_layouts() -> None:
    assert [task.name for task in find_tasks(["niah"])] == NAMES
    assert [task.protocol for task in find_tasks(["niah"])] == ["snapkv", "kamradt", "passkey"]
    about = {task.name: task.about for task in find_tasks(["niah"])}
    assert [about[name].samples for name in NAMES] == [50, 175, 50]
    assert [about[name].metric for name in NAMES] == ["keyword_recall", "keyword_recall", "string_match_all"]
    snapkv, kamradt = about["niah/snapkv"], about["niah/kamradt"]
    assert (snapkv.source, snapkv.revision, snapkv.licence) == ("Zefan-Cai/KVCache-Factory", "c97f9d7", "MIT")
    assert (kamradt.revision, kamradt.licence) == ("needlehaystack 0.1.0", "MIT")


def test_the_classic_needle_is_scored_by_keywords_with_rouge_beside(options: Options) -> None:
    sample = draw_samples("niah/snapkv", options(limit=1))[0]
    score = TASKS["niah/snapkv"].score(sample, "go to the beach on a sunny day.")
    assert score["score"] == pytest.approx(4 / 11)
    assert score["rouge1"] == pytest.approx(0.414, abs=5e-4)
    assert score["rougeL"] == pytest.approx(2 * 5 / 29)  # the ... on a sunny day: 5 of 21 and of 8 words, in order
    assert TASKS["niah/snapkv"].score(sample, sample.answers[0])["rouge1"] == pytest.approx(0.727, abs=5e-4)


def test_the_passkey_is_found_exactly_or_not(options: Options) -> None:
    samples = draw_samples("niah/passkey", options())
    keys = [sample.answers[0] for sample in samples]
    assert len(set(keys)) == len(samples)
    assert all(re.fullmatch(r"[1-9]\d{6}", key) for key in keys)
    for sample, key in zip(samples, keys, strict=True):
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
        message = len(chosen.tokenizer.encode(sample.context + sample.question))
        prompt = message + len(chosen.tokenizer.encode(sample.answer_prefix)) + (12 if sample.chat else 0)
        assert prompt + sample.max_new_tokens <= length
        assert sample.meta["prompt_tokens"] == prompt
        assert sample.meta["length"] == length


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
def test_samples_depend_on_the_seed_and_their_id_alone(name: str, options: Options) -> None:
    many = draw_samples(name, options(lengths=(1024, 512), limit=23))
    assert many == draw_samples(name, options(lengths=(1024, 512), limit=23, tokenizer=Words()))
    assert draw_samples(name, options(lengths=(512,), limit=12)) == many[23:35]
    assert len({sample.id for sample in many}) == 46
    other = draw_samples(name, options(lengths=(512,), limit=12, seed=7))
    assert [sample.id for sample in other] != [sample.id for sample in many[23:35]]


@pytest.mark.parametrize("name", NAMES)
def test_the_needle_stands_once_after_a_sentence_near_its_depth(name: str, options: Options) -> None:
    for sample in draw_samples(name, options(lengths=(4096,))):
        needle = sample.meta["needles"][0]
        text = haystack(sample)
        assert sample.context.count(needle) == 1
        assert sample.question not in sample.context
        before, after = text.split(f"\n{needle}\n")
        depth = sample.meta["depth"]
        assert 100 * len(before) / len(before + after) == pytest.approx(depth, abs=1)
        if depth == 0:
            assert before == ""
        elif depth < 100:
            assert before.endswith(".")
        else:
            assert after == ""


def test_the_first_haystack_begins_with_the_first_essay(options: Options) -> None:
    text = read_essays(options()).text
    for sample in draw_samples("niah/snapkv", options()):
        assert sample.meta["haystack"] == 0
        plain = haystack(sample).replace(f"\n{CLASSIC}\n", "")
        assert text.startswith(plain)


def test_the_snapkv_prompt_word_for_word(options: Options) -> None:
    sample = draw_samples("niah/snapkv", options(limit=1))[0]
    assert not sample.chat
    assert sample.stop == ("\n",)
    assert sample.max_new_tokens == 30
    assert sample.answers == ("eat a sandwich and sit in Dolores Park on a sunny day.",)
    assert sample.context + sample.question + sample.answer_prefix == (
        f"<|im_start|> This is a very long story book: <book> {haystack(sample)} </book>.\n Based on the content of "
        "the book, Question: The best thing to do in San Francisco is: \nAnswer:"
    )
    assert f"\n{CLASSIC}\n" in haystack(sample)


def test_the_kamradt_prompt_word_for_word(options: Options) -> None:
    sample = draw_samples("niah/kamradt", options(limit=1))[0]
    assert sample.chat
    assert sample.context.startswith(
        "You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n\n"
    )
    assert sample.question == (
        "What is the best thing to do in San Francisco? "
        "Don't give information outside the document or repeat your findings"
    )
    assert f"\n{CLASSIC}\n" in sample.context


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_small_names_the_smallest_one(name: str, options: Options) -> None:
    with pytest.raises(TaskError, match="64 tokens are too few; the smallest length that works is") as error:
        TASKS[name].samples(options(lengths=(64,)))
    smallest = int(str(error.value).rsplit(" ", 1)[1])
    samples = draw_samples(name, options(lengths=(smallest,)))
    assert all(len(haystack(sample).split()) >= 100 for sample in samples)
    with pytest.raises(TaskError, match="too few"):
        TASKS[name].samples(options(lengths=(smallest - 1,)))


def test_lengths_beyond_the_run_and_missing_essays_are_refused(options: Options, tmp_path: Path) -> None:
    task = TASKS["niah/snapkv"]
    with pytest.raises(TaskError, match="length 2048 exceeds the 2000 tokens"):
        task.samples(options(lengths=(2048,), max_tokens=2000))
    with pytest.raises(TaskError, match=f"no essays in {re.escape(str(tmp_path))}"):
        task.samples(options(fetch=lambda _: tmp_path))


def test_provenance_is_json_with_a_checksum(options: Options) -> None:
    said = TASKS["niah/kamradt"].provenance(options())
    assert json.loads(json.dumps(said)) == said
    assert re.fullmatch("[0-9a-f]{64}", said["essays_sha256"])
    assert said["essays"].startswith("5 ")


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
