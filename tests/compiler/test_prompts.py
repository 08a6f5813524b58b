"""Calibration prompts: what a sample depends on, lengths, balance, spans, answers, and wording of our own."""

import re
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from harness.compiler import wordings
from harness.compiler.corpora import Corpus, corpus_of
from harness.compiler.prompts import ALIKE, CONTINUATION, FAMILIES, calibration_samples
from harness.errors import HarnessError
from harness.models.prompt import TaskTokenizer, wrap
from harness.models.tiny import tiny_tokenizer
from tasks.base import Sample
from tasks.ruler import niah, vt
from tests.task_data import Words

NOUNS = ("river", "stone", "cloud", "garden", "window", "paper", "horse", "letter", "candle", "bridge")
EVALUATION = (  # what RULER, the needle tests, LongBench and our own tasks say, in lower case
    *("special magic", "hidden within", "memorize", "i will quiz you", "mentioned in the provided text", "variable"),
    *("assign", "track", "chain", "in the text above", "coded list", "most common words", "most often appeared"),
    *("san francisco", "sandwich", "dolores", "best thing to do", "pass key", "passkey", "important info"),
    *("given context", "based on the following", "given passages", "following text", "read the following"),
    *("answer the question", "paragraph", "as concisely as you can", "summary", "is from one of", "documentation of"),
)


def made(paragraphs: int = 1200, words: range = range(9, 24), seed: int = 1) -> Corpus:
    """Paragraphs of four sentences, in each of which is one word, such as `q17x`, that is nowhere else."""
    draw, sentences = Random(seed), []
    for number in range(4 * paragraphs):
        middle = draw.choices(NOUNS, k=draw.choice(words) - 3)
        sentences.append(f"The {' '.join(middle)} q{number}x {draw.choice(NOUNS)}.")
    return in_paragraphs("made", sentences)


def in_paragraphs(name: str, sentences: list[str]) -> Corpus:
    return corpus_of(name, (" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4)))


def samples_of(count: int, *families: str, corpus: Corpus | None = None, **changes: Any) -> list[Sample]:
    asked = {"seed": 7, "families": families or FAMILIES, **changes}
    return calibration_samples(corpus or CORPUS, TOKENIZER, count=count, **asked)


CORPUS, TOKENIZER = made(), Words()
AROUND = "\n\n".join(CORPUS.paragraphs * 2)
SAMPLES = samples_of(50)
each_family = pytest.mark.parametrize("family", FAMILIES)


def of(*families: str) -> list[Sample]:
    return [sample for sample in SAMPLES if sample.meta["family"] in families]


def without_intro(text: str) -> str:
    return next(text.removeprefix(intro) for intro in reversed(wordings.INTROS) if text.startswith(intro))


def test_same_call_same_samples_of_every_family_in_turn() -> None:
    assert calibration_samples(CORPUS, Words(), count=50, seed=7) == SAMPLES
    assert [sample.id for sample in SAMPLES] == [f"made/{name}/{i}" for i in range(10) for name in FAMILIES]
    assert samples_of(12) == SAMPLES[:12]


@each_family
def test_a_sample_does_not_depend_on_the_other_families(family: str) -> None:
    assert samples_of(10, family) == of(family)


def test_seed_and_corpus_change_every_sample() -> None:
    for other in (samples_of(50, seed=8), samples_of(50, corpus=made(seed=2))):
        assert not {sample.context for sample in SAMPLES} & {sample.context for sample in other}


def test_the_name_of_the_corpus_is_in_the_id_alone() -> None:
    for sample, known in zip(samples_of(5, corpus=replace(CORPUS, name="other")), SAMPLES, strict=False):
        assert sample.id == known.id.replace("made/", "other/")
        assert replace(sample, id=known.id, meta=known.meta) == known


def test_prompts_fill_their_lengths() -> None:
    for sample in SAMPLES:
        text = sample.context + sample.question + sample.answer_prefix
        tokens = len(TOKENIZER.encode(text)) + (TOKENIZER.template_tokens if sample.chat else 1)
        assert 600 <= tokens <= 1000
        assert 0.95 * sample.meta["length"] <= tokens <= sample.meta["length"]


@each_family
def test_lengths_and_depths_are_spread_evenly(family: str) -> None:
    every = samples_of(40, family)
    for count in (8, 16, 40):
        found = every[:count]
        quarters = Counter(min(3, (sample.meta["length"] - 632) * 4 // 369) for sample in found)
        assert all(abs(quarters[q] - count / 4) <= 2 for q in range(4))
        if family != "continuation":
            reach = 75 if family == "tracking" else 100
            depths = Counter(min(3, sample.meta["depth"] * 4 // reach) for sample in found)
            assert all(abs(depths[q] - count / 4) <= max(3, 0.2 * count) for q in range(4))


def test_depth_is_not_tied_to_length() -> None:
    metas = [sample.meta for sample in samples_of(64, "needle")]
    cells = Counter((meta["depth"] // 26, (meta["length"] - 632) // 93) for meta in metas)
    assert len(cells) == 16 and max(cells.values()) <= 8


def test_spans_of_a_large_corpus_do_not_overlap() -> None:
    seen: set[int] = set()
    for sample in SAMPLES:
        shown = {*map(int, re.findall(r"\bq(\d+)x\b", sample.context + sample.question + sample.answers[0]))}
        assert len(shown) > 20 and not shown & seen
        seen |= shown
    assert len(seen) > 0.3 * 4800


def test_a_small_corpus_is_used_again_under_other_questions() -> None:
    assert len({sample.context + sample.question for sample in samples_of(40, corpus=made(40))}) == 40


def test_continuation_is_the_corpus_itself() -> None:
    for sample in of("continuation"):
        assert sample.context + sample.question + sample.answers[0] in AROUND
        assert not sample.chat and "needles" not in sample.meta
        assert CONTINUATION - 3 <= len(TOKENIZER.encode(sample.answers[0])) <= CONTINUATION
        assert 2 <= sample.question.count(".") <= 3


def test_copy_asks_for_one_sentence_of_the_corpus() -> None:
    for sample in of("copy"):
        (sentence,), (answer,) = sample.meta["needles"], sample.answers
        assert any(sentence in paragraph for paragraph in CORPUS.paragraphs)
        assert 8 <= len(sentence.split()) <= 30
        opening = sentence.removesuffix(answer).strip()
        assert 4 <= len(opening.split()) <= 6 and sample.context.count(opening) == 1
        assert opening in sample.question and sample.answer_prefix.endswith(opening)
        assert answer not in sample.question


@each_family
def test_answers_are_in_the_context(family: str) -> None:
    for sample in of(family):
        told = sample.meta.get("needles", [])
        assert (sample.answers[0] in sample.context) == (family != "continuation")
        assert all(sample.context.count(needle) == 1 for needle in told)
        assert not told or sample.answers[0] in told[0]
        if family in ("needle", "multikey", "tracking"):
            assert re.search(rf"\b{sample.answers[0]}\b", sample.context)
            assert sample.answers[0] not in sample.question + sample.answer_prefix


def test_what_is_copied_begins_like_nothing_else() -> None:
    said = ["Then the candle q{}x fell into the garden.", *["And so it came to pass that q{}x was by the river."] * 8]
    alike = in_paragraphs("alike", [said[i % 9].format(i) for i in range(2000)])
    for sample in samples_of(12, "copy", corpus=alike):
        assert sample.meta["needles"][0].startswith("Then the candle")


def test_invented_words_are_not_in_the_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [f"zup{letter}l" for letter in "aeiouy"]
    monkeypatch.setattr("harness.compiler.prompts.invented", lambda draws: draws.choice([*NOUNS, *free]))
    found = samples_of(40, "needle", "multikey", "tracking")
    words = {sample.answers[0] for sample in found if sample.answers[0].isalpha()}
    assert len(words) > 2 and words <= {*free}


def hidden(sample: Sample) -> list[str]:
    """Sentences of a context that are not of the corpus."""
    sentences = re.findall(r"[A-Z][^.]*\.", without_intro(sample.context))
    return [sentence for sentence in sentences if not re.search(r"\bq\d+x\b", sentence)]


def test_prose_around_hidden_sentences_is_whole() -> None:
    for sample in of("needle", "multikey", "tracking"):
        rest = without_intro(sample.context)
        for sentence in hidden(sample):
            rest = rest.replace(f" {sentence}" if f" {sentence}" in rest else f"{sentence} ", "", 1)
        assert rest.lstrip() in AROUND


def test_numbers_of_hidden_sentences() -> None:
    assert {len(hidden(sample)) for sample in of("needle")} == {1}
    assert {len(hidden(sample)) for sample in samples_of(40, "multikey")} == {3, 4, 5}
    trails = samples_of(40, "tracking")
    assert {len(sample.meta["needles"]) for sample in trails} == {2, 3, 4}
    for sample in trails:
        assert len(hidden(sample)) == len(sample.meta["needles"]) + 1  # one leads nowhere
        places = [sample.context.index(needle) for needle in sample.meta["needles"]]
        assert places == sorted(places)


ALIKE_SAMPLES = samples_of(40, *ALIKE)


def test_text_that_says_the_same_again_changes_no_other_family() -> None:
    assert [sample for sample in samples_of(70, *FAMILIES, *ALIKE) if sample.meta["family"] in FAMILIES] == SAMPLES
    assert [sample.id for sample in ALIKE_SAMPLES] == [f"made/{name}/{i}" for i in range(20) for name in ALIKE]


def test_text_that_says_the_same_again_fills_its_length_with_one_answer() -> None:
    for sample in ALIKE_SAMPLES:
        text = sample.context + sample.question + sample.answer_prefix
        tokens = len(TOKENIZER.encode(text)) + TOKENIZER.template_tokens
        assert 0.95 * sample.meta["length"] <= tokens <= sample.meta["length"]
        assert all(sample.context.count(needle) == 1 for needle in sample.meta["needles"])
        assert sample.answers[0] in sample.meta["needles"][0]
        assert not re.search(rf"\b{sample.answers[0]}\b", sample.question + sample.answer_prefix)


def test_a_passage_is_said_over_and_over_around_what_is_hidden() -> None:
    sizes = Counter[int]()
    for sample in ALIKE_SAMPLES[::2]:
        numbers = re.findall(r"\bq(\d+)x\b", sample.context)
        assert numbers == [numbers[i % len({*numbers})] for i in range(len(numbers))] and len(numbers) > 15
        sizes[len({*numbers})] += 1
        trail = len(sample.meta["needles"])
        assert len(hidden(sample)) in ((3, 4, 5) if trail == 1 else (trail + 1,))
    assert {*sizes} == {2, 3, 4}


def test_records_are_lines_of_one_form_that_each_say_another_number() -> None:
    for sample in ALIKE_SAMPLES[1::2]:
        lines = without_intro(sample.context).split("\n")
        forms = {
            re.sub(r"[A-Z][a-z]+", "K", re.sub("|".join((*wordings.COLOURS, *wordings.PLACES)), "w", line))
            for line in lines
        }
        assert len({re.sub(r"\d+", "N", form) for form in forms}) == 1
        assert len({*lines}) == len(lines) > 25 and sample.meta["needles"][0] in lines
        assert abs(lines.index(sample.meta["needles"][0]) / len(lines) - sample.meta["depth"] / 100) < 0.06


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_several_wordings_are_drawn(family: str) -> None:
    found = samples_of(30, family)
    assert len({re.sub(r"\W+", "", sample.answer_prefix)[:6] for sample in found}) >= 3
    assert len({sample.context[:12] for sample in found if sample.context.startswith(("Here", "What", "Pl"))}) == 3


def test_wording_is_unlike_evaluation_tasks() -> None:
    parts = [*wordings.INTROS, *wordings.ASIDES]
    for item in (*wordings.COPIES, *wordings.FACTS, *wordings.TRAILS, *wordings.LEDGERS):
        parts += [value for value in item if isinstance(value, str)]
    said = "\n".join(parts).casefold()
    assert [phrase for phrase in EVALUATION if phrase in said] == []
    theirs = f"{niah.NEEDLE} {niah.TEMPLATE} {niah.QUESTION} {vt.TEMPLATE} {vt.QUESTION} {vt.ANSWER_PREFIX}".casefold()
    assert sum(phrase in theirs for phrase in EVALUATION) >= 9  # the list is of their phrases

    def threes(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.casefold())
        return {*zip(words, words[1:], words[2:], strict=False)}

    assert not threes(theirs) & set[tuple[str, ...]]().union(*map(threes, parts))


def test_on_a_model_the_prompt_has_these_tokens() -> None:
    core = tiny_tokenizer()
    for sample in calibration_samples(CORPUS, TaskTokenizer(core), count=10, seed=3, lengths=(1500, 2500)):
        wrapped = wrap(core, sample)
        assert 0.95 * sample.meta["length"] <= len(wrapped.ids) <= sample.meta["length"]
        assert 0 < wrapped.context < len(wrapped.ids)
        assert len(wrapped.needle) == sum(map(len, sample.meta.get("needles", [])))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"lengths": (40, 60)}, r"corpus 'made': no continuation prompt of \d+ tokens can be made of whole sentences"),
        ({"lengths": (90_000, 90_000)}, r"corpus 'made' has about \d+ tokens, a prompt of 90000 .* give it more text"),
        ({"corpus": made(words=range(40, 50)), "families": ["copy"]}, r"no copy prompt of"),
    ],
)
def test_refusals(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message) as caught:
        samples_of(5, **asked)
    assert "\n" not in str(caught.value)
