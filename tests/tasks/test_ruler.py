"""RULER's tasks: answers against naive solvers. Their wording is compared with lm-eval's in test_upstream_ruler.py."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from scipy.special import zeta

from tasks.base import TASKS, Sample
from tasks.essays import Essays
from tasks.ruler import aggregation, corpus, vt
from tasks.ruler.aggregation import CommonWords, counts
from tasks.ruler.family import SamplePlan
from tasks.ruler.niah import DEPTHS, ROWS, NeedleGenerator
from tests.task_data import NEEDLES, RULER, Options, Words, draw_samples

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def test_a_part_of_the_answers_is_a_part_of_the_score(options: Options) -> None:
    sample = draw_samples("ruler/vt", options())[0]
    said = " ".join(sample.answers[:2]), f" {', '.join(sample.answers).lower()}."
    assert [TASKS["ruler/vt"].score(sample, text)["score"] for text in said] == pytest.approx([0.4, 1])
    assert TASKS["ruler/vt"].reference(sample) == ", ".join(sample.answers)
    asked = draw_samples("ruler/qa_1", options())[0]
    answer, alias = asked.answers
    assert TASKS["ruler/qa_1"].score(asked, alias)["score"] == 1
    assert TASKS["ruler/qa_1"].reference(asked) == answer


@pytest.mark.parametrize("name", RULER)
def test_needles_stand_in_the_context_verbatim_and_the_question_does_not(name: str, options: Options) -> None:
    for sample in draw_samples(f"ruler/{name}", options(lengths=(512, 1024))):
        assert (sample.chat, sample.stop, sample.context[-1]) == (True, (), "\n")
        if name != "cwe":  # its worked example asks the same question
            assert sample.question.rsplit("\n", 1)[-1] not in sample.context
        if name in (*NEEDLES, "vt"):
            for needle, answer in zip(sample.meta["needles"], sample.answers, strict=True):
                assert sample.context.count(needle) == 1
                assert answer in needle


def found_values(sample: Sample, kind: str) -> list[str]:
    """A naive solver: the values of the asked keys, by key in the order of the question."""
    query = re.search(r"for (.+) mentioned in the provided text\?", sample.question)
    assert query is not None
    keys = re.split(r", and |, ", query[1])
    pairs = re.findall(rf"One of the special magic {kind} for (.+?) is: (.+?)\.", sample.context)
    return [value for key in keys for found, value in pairs if found == key]


@pytest.mark.parametrize("name", NEEDLES)
def test_answers_are_the_values_of_the_asked_keys(name: str, options: Options) -> None:
    row = ROWS[name]
    pattern = {
        "numbers": r"[1-9]\d{6}",
        "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    }
    for sample in draw_samples(f"ruler/{name}", options(lengths=(1024,))):
        assert sorted(found_values(sample, row.values)) == sorted(sample.answers)
        assert len(set(sample.answers)) == row.q * row.v
        assert all(re.fullmatch(pattern[row.values], answer) for answer in sample.answers)
        needles = sample.context.count("One of the special magic")
        assert needles > 10 if row.haystack == "needle" else needles == row.k * row.v
        assert (NOISE in sample.context) == (row.haystack == "noise")


def test_keys_are_asked_for_in_a_list_and_noise_is_lines(options: Options) -> None:
    sample = draw_samples("ruler/niah_multiquery", options(lengths=(512,)))[0]
    keys = [re.sub(r".* for (.*) is: .*", r"\1", needle) for needle in sample.meta["needles"]]
    query = f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    assert sample.question == f"What are all the special magic numbers for {query} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic numbers for {query} mentioned in the provided text are"
    values = draw_samples("ruler/niah_multivalue", options(lengths=(512,)))[0]
    assert len({needle.split(" is: ")[0] for needle in values.meta["needles"]}) == 1
    noise = draw_samples("ruler/niah_single_1", options(lengths=(512,)))[0]
    lines = noise.context.split("\n")[1:-1]
    assert Counter(lines) == {NOISE: len(lines) - 1, noise.meta["needles"][0]: 1}


@pytest.mark.parametrize(
    ("at", "hidden"),
    [
        (0.0, " {} One two. Three four. Five six."),
        (0.5, "One two. {} Three four. Five six."),
        (0.99, "One two. Three four. Five six. {} "),
    ],
)
def test_an_essay_prompt_in_full(at: float, hidden: str) -> None:
    """NVIDIA joins with a space even where nothing comes before or after the needle."""
    generator = NeedleGenerator(ROWS["niah_single_2"], Essays("One two.\n\nThree  four. Five six.", files=1))
    prompt = generator.build(6, SamplePlan(4096, 0, random.Random(5), at))
    key = re.sub(r".* for (.*) is: .*", r"\1", prompt.meta["needles"][0])
    needle = f"One of the special magic numbers for {key} is: {prompt.answers[0]}."
    assert prompt.context + prompt.question + prompt.answer_prefix == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the number afterwards.\n{hidden.format(needle)}\n"
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )


def test_depths_are_forty_points_and_reach_the_text(options: Options) -> None:
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40)).astype(int).tolist()
    for sample in draw_samples("ruler/niah_single_2", options(lengths=(4096,), limit=20)):
        text = sample.context.split("\n", 1)[1]
        place = text.index(sample.meta["needles"][0])
        assert sample.meta["depth"] == pytest.approx(100 * place / len(text), abs=2)
        assert text[:place] == " " or text[:place].endswith(". ")


def assigned(text: str, value: str) -> list[str]:
    """A naive solver: variables that hold `value`, in the order of the chain."""
    pairs = dict(re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text))
    chain, holder = [], value
    while holder in pairs.values():
        holder = next(name for name, right in pairs.items() if right == holder)
        chain.append(holder)
    return chain


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_variable_tracking_asks_for_a_chain_of_five_after_an_example(length: int, options: Options) -> None:
    order, question = (part.split("{")[0] for part in (vt.TEMPLATE, vt.QUESTION))
    for sample in draw_samples("ruler/vt", options(lengths=(length,))):
        empty, example, asked = sample.context.split(order)
        value = sample.question.removeprefix(question).split()[0]
        assert empty == ""
        assert assigned(asked, value) == list(sample.answers)
        assert all(re.fullmatch("[A-Z]{5}", answer) for answer in sample.answers)
        text, solved = example.split(question)
        shown = solved.split()[0]
        names = assigned(text, shown)
        assert len(names) == 5
        assert all(re.fullmatch("[A-Z]{3}", name) for name in names)
        assert solved.endswith(vt.ANSWER_PREFIX.format(query=shown, num_v=5) + " " + " ".join(names) + "\n\n")
        assert shown != value
        assert len(Words().encode(example)) <= 500
        assert set(asked.split("\n")) - {""} <= {NOISE, *NOISE.replace(". ", ".\n").split("\n"), *chain_lines(sample)}


def chain_lines(sample: Sample) -> set[str]:
    first, *hops = sample.meta["needles"]
    return {first, *(f"{hop} " for hop in hops)}


@pytest.mark.parametrize(("length", "common", "rare"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_ten_most_frequent(length: int, common: int, rare: int, options: Options) -> None:
    for sample in draw_samples("ruler/cwe", options(lengths=(length,))):
        empty, example, asked = sample.context.split(aggregation.COMMON_TEMPLATE.split("{")[0])
        assert empty == ""
        seen = numbered(asked)
        assert set(seen.values()) == {common, rare}
        assert {word for word, times in seen.items() if times == common} == set(sample.answers)
        assert len(sample.answers) == 10
        shown, solved = example.split(f"\n{sample.question}{sample.answer_prefix} ")
        times = (3, 1) if length < 4096 else (10, 3)
        assert Counter(numbered(shown).values()) == {times[0]: 10, times[1]: 10 if length < 4096 else 30}
        assert set(numbered(solved)) == {word for word, n in numbered(shown).items() if n == times[0]}


def numbered(text: str) -> Counter[str]:
    """Words of `1. first 2. second ...`, counted."""
    parts = re.split(r"(?:^|\s)(\d+)\. ", text.strip())[1:]
    assert [int(number) for number in parts[::2]] == list(range(1, len(parts) // 2 + 1))
    return Counter(parts[1::2])


def test_words_beyond_the_list_are_pairs() -> None:
    pool = len(corpus.all_words())
    assert pool > 8000
    prompt = CommonWords().build(pool + 50, SamplePlan(131072, 0, random.Random(3), 0.0))
    assert prompt.meta["pairs"] == 50
    assert len(numbered(prompt.context.split("\n")[-2])) == pool + 50


@pytest.mark.parametrize("length", [512, 4096])
def test_frequent_words_are_ranks_two_to_four(length: int, options: Options) -> None:
    order = aggregation.CODED_TEMPLATE.split("{")[0]
    for sample in draw_samples("ruler/fwe", options(lengths=(length,))):
        assert sample.context.endswith("\n") and sample.context.count("\n") == 1
        ranked = Counter(sample.context.removeprefix(order).split()).most_common()
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == list(sample.answers)
        assert len(ranked) <= length // 50
        assert ranked[3][1] > ranked[4][1]
        assert ranked[0][1] / ranked[1][1] == pytest.approx(4, rel=0.1)  # rank ** -2
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])


def test_counts_are_those_of_the_zeta_distribution() -> None:
    """NVIDIA rounds down in floating point; where the ranks' shares are no whole numbers both agree."""
    ranks = np.arange(1, 656)
    for units in (1, 97, 5_461, 20_480, 131_072):
        assert list(counts(units, 655)) == (units * ranks**-2.0 / zeta(2.0)).astype(int).tolist()
