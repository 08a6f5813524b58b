"""Calibration prompts: what a sample depends on, lengths, balance, spans, answers, and wording of our own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from harness.compiler import wordings
from harness.compiler.corpora import Corpus, corpus_of
from harness.compiler.prompts import CONTINUATION, FAMILIES, calibration_samples
from harness.errors import HarnessError
from harness.models.prompt import TaskTokenizer, wrap
from harness.models.tiny import tiny_tokenizer
from tasks.base import Sample
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
    draw, number, found = Random(seed), 0, []
    for _ in range(paragraphs):
        sentences = []
        for _ in range(4):
            middle = draw.choices(NOUNS, k=draw.choice(words) - 3)
            sentences.append(f"The {' '.join(middle)} q{number}x {draw.choice(NOUNS)}.")
            number += 1
        found.append(" ".join(sentences))
    return corpus_of("made", found)


CORPUS = made()
TOKENIZER = Words()
SAMPLES = calibration_samples(CORPUS, TOKENIZER, count=50, seed=7)
each_family = pytest.mark.parametrize("family", FAMILIES)


def of(family: str, samples: Sequence[Sample] = SAMPLES) -> list[Sample]:
    return [sample for sample in samples if sample.meta["family"] == family]


def numbers(sample: Sample) -> set[int]:
    """Sentences of the corpus that a prompt and its answer show."""
    shown = sample.context + sample.question + sample.answers[0]
    return {int(found) for found in re.findall(r"\bq(\d+)x\b", shown)}


def without_intro(text: str) -> str:
    return next(text.removeprefix(intro) for intro in reversed(wordings.INTROS) if text.startswith(intro))


def test_same_call_same_samples() -> None:
    assert calibration_samples(CORPUS, Words(), count=50, seed=7) == SAMPLES
    assert len({sample.id for sample in SAMPLES}) == 50
    assert SAMPLES[6].id == "made/copy/1"


def test_fewer_are_the_first_ones() -> None:
    assert calibration_samples(CORPUS, TOKENIZER, count=10, seed=7) == SAMPLES[:10]


@each_family
def test_a_sample_does_not_depend_on_the_other_families(family: str) -> None:
    assert calibration_samples(CORPUS, TOKENIZER, count=10, seed=7, families=[family]) == of(family)


def test_seed_and_corpus_change_every_sample() -> None:
    for other in (
        calibration_samples(CORPUS, TOKENIZER, count=50, seed=8),
        calibration_samples(made(seed=2), TOKENIZER, count=50, seed=7),
    ):
        assert not {sample.context for sample in SAMPLES} & {sample.context for sample in other}


def test_the_name_of_the_corpus_is_in_the_id_alone() -> None:
    renamed = calibration_samples(replace(CORPUS, name="other"), TOKENIZER, count=5, seed=7)
    for sample, known in zip(renamed, SAMPLES, strict=False):
        assert sample.id == known.id.replace("made/", "other/")
        assert replace(sample, id=known.id, meta=known.meta) == known


def test_any_first_samples_are_balanced_over_families() -> None:
    for count in (5, 12, 50):
        sizes = Counter(sample.meta["family"] for sample in SAMPLES[:count])
        assert max(sizes.values()) - min(sizes.values()) <= (count % 5 > 0)


def test_prompts_fill_their_lengths() -> None:
    for sample in SAMPLES:
        text = sample.context + sample.question + sample.answer_prefix
        tokens = len(TOKENIZER.encode(text)) + (TOKENIZER.template_tokens if sample.chat else 1)
        assert 600 <= tokens <= 1000
        assert 0.95 * sample.meta["length"] <= tokens <= sample.meta["length"]


@each_family
def test_lengths_and_depths_are_spread_evenly(family: str) -> None:
    every = calibration_samples(CORPUS, TOKENIZER, count=40, seed=7, families=[family])
    for count in (8, 16, 40):
        found = every[:count]
        quarters = Counter(min(3, (sample.meta["length"] - 632) * 4 // 369) for sample in found)
        assert all(abs(quarters[q] - count / 4) <= 2 for q in range(4))
        if family != "continuation":
            reach = 75 if family == "tracking" else 100
            depths = Counter(min(3, sample.meta["depth"] * 4 // reach) for sample in found)
            assert all(abs(depths[q] - count / 4) <= max(3, 0.2 * count) for q in range(4))


def test_depth_is_not_tied_to_length() -> None:
    found = calibration_samples(CORPUS, TOKENIZER, count=64, seed=7, families=["needle"])
    cells = Counter((sample.meta["depth"] // 26, (sample.meta["length"] - 632) // 93) for sample in found)
    assert len(cells) == 16 and max(cells.values()) <= 8


def test_spans_of_a_large_corpus_do_not_overlap() -> None:
    seen: set[int] = set()
    for sample in SAMPLES:
        shown = numbers(sample)
        assert len(shown) > 20 and not shown & seen
        seen |= shown
    assert len(seen) > 0.3 * 4800


def test_a_small_corpus_is_used_again_under_other_questions() -> None:
    small = calibration_samples(made(40), TOKENIZER, count=40, seed=7)
    assert len({sample.context + sample.question for sample in small}) == 40


def test_continuation_is_the_corpus_itself() -> None:
    around = "\n\n".join(CORPUS.paragraphs)
    around = f"{around}\n\n{around}"
    for sample in of("continuation"):
        assert sample.context + sample.question + sample.answers[0] in around
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
    sentences = [
        f"And so it came to pass that q{i}x was by the river."
        if i % 9
        else f"Then the candle q{i}x fell into the garden."
        for i in range(2000)
    ]
    corpus = corpus_of("alike", (" ".join(sentences[i : i + 4]) for i in range(0, 2000, 4)))
    for sample in calibration_samples(corpus, TOKENIZER, count=12, seed=7, families=["copy"]):
        assert sample.meta["needles"][0].startswith("Then the candle")


def test_invented_words_are_not_in_the_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [f"zup{letter}l" for letter in "aeiouy"]
    monkeypatch.setattr("harness.compiler.prompts.invented", lambda draws: draws.choice([*NOUNS, *free]))
    found = calibration_samples(CORPUS, TOKENIZER, count=40, seed=7, families=["needle", "multikey", "tracking"])
    words = {sample.answers[0] for sample in found if sample.answers[0].isalpha()}
    assert len(words) > 2 and words <= {*free}


def hidden(sample: Sample) -> list[str]:
    """Sentences of a context that are not of the corpus."""
    sentences = re.findall(r"[A-Z][^.]*\.", without_intro(sample.context))
    return [sentence for sentence in sentences if not re.search(r"\bq\d+x\b", sentence)]


def test_prose_around_hidden_sentences_is_whole() -> None:
    for sample in (*of("needle"), *of("multikey"), *of("tracking")):
        rest = without_intro(sample.context)
        for sentence in hidden(sample):
            rest = (
                rest.replace(f" {sentence}", "", 1) if f" {sentence}" in rest else rest.replace(f"{sentence} ", "", 1)
            )
        around = "\n\n".join(CORPUS.paragraphs)
        assert rest in f"{around}\n\n{around}" or rest.lstrip() in f"{around}\n\n{around}"


def test_numbers_of_hidden_sentences() -> None:
    assert {len(hidden(sample)) for sample in of("needle")} == {1}
    many = calibration_samples(CORPUS, TOKENIZER, count=40, seed=7, families=["multikey"])
    assert {len(hidden(sample)) for sample in many} == {3, 4, 5}
    trails = calibration_samples(CORPUS, TOKENIZER, count=40, seed=7, families=["tracking"])
    assert {len(sample.meta["needles"]) for sample in trails} == {2, 3, 4}
    for sample in trails:
        assert len(hidden(sample)) == len(sample.meta["needles"]) + 1  # one leads nowhere
        places = [sample.context.index(needle) for needle in sample.meta["needles"]]
        assert places == sorted(places)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_several_wordings_are_drawn(family: str) -> None:
    found = calibration_samples(CORPUS, TOKENIZER, count=30, seed=7, families=[family])
    assert len({re.sub(r"\W+", "", sample.answer_prefix)[:6] for sample in found}) >= 3
    assert len({sample.context[:12] for sample in found if sample.context.startswith(("Here", "What", "Pl"))}) == 3


def test_wording_is_unlike_evaluation_tasks() -> None:
    parts = [*wordings.INTROS, *wordings.ASIDES]
    for item in (*wordings.COPIES, *wordings.FACTS, *wordings.TRAILS):
        parts += [value for value in vars(item).values() if isinstance(value, str)]
    said = "\n".join(parts).casefold()
    assert [phrase for phrase in EVALUATION if phrase in said] == []
    from tasks.ruler import niah, vt

    theirs = f"{niah.NEEDLE} {niah.TEMPLATE} {niah.QUESTION} {vt.TEMPLATE} {vt.QUESTION} {vt.ANSWER_PREFIX}".casefold()
    assert sum(phrase in theirs for phrase in EVALUATION) >= 9  # the list is of their phrases
    three = {tuple(words[i : i + 3]) for words in (re.findall(r"\w+", theirs),) for i in range(len(words) - 2)}
    ours = [re.findall(r"\w+", part.casefold()) for part in parts]
    assert not three & {tuple(words[i : i + 3]) for words in ours for i in range(len(words) - 2)}


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
        ({"families": ("copy", "nedle")}, r"unknown calibration family 'nedle'; did you mean 'needle'\?"),
        ({"families": ()}, r"name at least one"),
        ({"families": ("copy", "copy")}, r"copy, copy: name at least one, and each once"),
        ({"count": 0}, r"^0 calibration prompts"),
        ({"lengths": (900, 600)}, r"lengths 900 to 600"),
        ({"lengths": (40, 60)}, r"corpus 'made': no continuation prompt of \d+ tokens can be made of whole sentences"),
        ({"lengths": (90_000, 90_000)}, r"corpus 'made' has about \d+ tokens, a prompt of 90000 .* give it more text"),
    ],
)
def test_refusals(asked: dict[str, object], message: str) -> None:
    with pytest.raises(HarnessError, match=message) as caught:
        calibration_samples(CORPUS, TOKENIZER, **{"count": 5, "seed": 7, **asked})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_no_sentence_to_copy() -> None:
    with pytest.raises(HarnessError, match="no copy prompt of"):
        calibration_samples(made(words=range(40, 50)), TOKENIZER, count=1, seed=7, families=["copy"])
