"""RULER's 13 tasks: wording against literals, answers against naive solvers, lengths, seeds and failures."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.base import TASKS, Sample, TaskError, TaskOptions, Tokenizer, find_tasks
from tasks.essays import Essays
from tasks.ruler import corpus, fit
from tasks.ruler.cwe import CommonWords
from tasks.ruler.niah import DEPTHS, ROWS

NAMES = [
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
]
NEEDLES = [name for name in NAMES if name.startswith("niah")]
GENERATION = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
Options = Callable[..., TaskOptions]


class Words(Tokenizer):
    """A token is a word with the white space before it; decoding gives the text back."""

    def __init__(self, template_tokens: int = 12) -> None:
        self.template_tokens = template_tokens
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids)) for word in re.findall(r"\s*\S+|\s+", text)]

    def decode(self, ids: Sequence[int]) -> str:
        words = list(self._ids)
        return "".join(words[i] for i in ids)


def prose(words: int, draw: random.Random) -> str:
    """One sentence."""
    text = " ".join(draw.choice(["river", "stone", "cloud", "garden", "window", "paper"]) for _ in range(words - 1))
    return f"The {text}."


def squad(draw: random.Random) -> dict[str, Any]:
    articles = []
    for a in range(8):
        paragraphs = []
        for p in range(6):
            answer = f"answer{a}x{p}"
            asked = {"question": f"What is {a} of {p}?", "answers": [{"text": answer}, {"text": f"alias{a}x{p}"}]}
            refused = {"question": "Refused?", "answers": [], "is_impossible": True}
            qas = [{**asked, "is_impossible": False}, refused]
            text = f"{prose(15, draw)} It is {answer}. {prose(15, draw)}"
            paragraphs.append({"context": text, "qas": qas})
        articles.append({"paragraphs": paragraphs})
    return {"data": articles}


def hotpot(draw: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Which is {i}?",
            "answer": f"answer{i}",
            "context": [
                [f"Title {i}.{k}", [prose(8, draw), f" Fact answer{i}." if k == 3 else " No."]] for k in range(10)
            ],
        }
        for i in range(30)
    ]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Options over small generated essays and question files."""
    draw = random.Random(1)
    folder = tmp_path_factory.mktemp("data")
    (folder / "PaulGrahamEssays").mkdir()
    for i in range(4):
        text = "\n".join(prose(draw.randint(4, 14), draw) for _ in range(40))
        (folder / "PaulGrahamEssays" / f"{i}.txt").write_text(text)
    (folder / "squad.json").write_text(json.dumps(squad(draw)))
    (folder / "ruler").mkdir()
    (folder / "ruler" / "hotpot.json").write_text(json.dumps(hotpot(draw)))
    base = TaskOptions(
        tokenizer=Words(), max_tokens=200_000, limit=4, data_dir=folder, fetch={"essays": folder}.__getitem__
    )
    return lambda **changes: replace(base, **changes)


def draw_samples(name: str, options: TaskOptions) -> list[Sample]:
    return list(TASKS[f"ruler/{name}"].samples(options))


def user_message(sample: Sample) -> str:
    return sample.context + sample.question


def test_the_family_is_the_thirteen_tasks() -> None:
    assert [task.name for task in find_tasks(["ruler"])] == [f"ruler/{name}" for name in NAMES]
    assert {task.protocol for task in find_tasks(["ruler"])} == {"official"}


@pytest.mark.parametrize("name", NAMES)
def test_gold_scores_one_and_nothing_scores_zero(name: str, options: Options) -> None:
    task = TASKS[f"ruler/{name}"]
    for sample in draw_samples(name, options(lengths=(1024,))):
        gold = task.reference(sample)
        assert gold is not None
        assert task.score(sample, f" {gold.upper()}.")["score"] == 1
        assert task.score(sample, "")["score"] == 0
        assert sample.chat
        assert sample.stop == ()


def test_a_part_of_the_answers_is_a_part_of_the_score(options: Options) -> None:
    sample = draw_samples("vt", options())[0]
    assert TASKS["ruler/vt"].score(sample, " ".join(sample.answers[:2]))["score"] == pytest.approx(0.4)
    asked = draw_samples("qa_1", options())[0]
    assert len(asked.answers) == 2
    assert TASKS["ruler/qa_1"].score(asked, asked.answers[1])["score"] == 1
    assert TASKS["ruler/vt"].reference(sample) == ", ".join(sample.answers)
    assert TASKS["ruler/qa_1"].reference(asked) == asked.answers[0]


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_generation_fill_the_length_and_fit(name: str, length: int, options: Options) -> None:
    chosen = options(lengths=(length,), limit=6)
    samples = draw_samples(name, chosen)
    assert len(samples) == 6
    for sample in samples:
        assert sample.max_new_tokens == GENERATION.get(name, 128)
        prompt = len(chosen.tokenizer.encode(user_message(sample))) + len(chosen.tokenizer.encode(sample.answer_prefix))
        total = prompt + chosen.tokenizer.template_tokens + sample.max_new_tokens
        assert 0.85 * length < total <= length
        assert sample.meta["prompt_tokens"] == total - sample.max_new_tokens
        assert sample.meta["length"] == length


@pytest.mark.parametrize("name", NAMES)
def test_what_the_chat_template_adds_is_counted(name: str, options: Options) -> None:
    for sample in draw_samples(name, options(lengths=(1024,), tokenizer=Words(template_tokens=150))):
        assert len(Words().encode(user_message(sample) + sample.answer_prefix)) <= 1024 - 150 - sample.max_new_tokens


@pytest.mark.parametrize("name", NAMES)
def test_samples_depend_on_the_seed_and_their_id_alone(name: str, options: Options) -> None:
    many = draw_samples(name, options(lengths=(1024, 512), limit=5))
    assert [sample.id for sample in many] == [f"{length}/{i}" for length in (1024, 512) for i in range(5)]
    assert many == draw_samples(name, options(lengths=(1024, 512), limit=5, tokenizer=Words()))
    assert draw_samples(name, options(lengths=(512,), limit=3)) == many[5:8]
    assert len({user_message(sample) for sample in many}) == 10
    other = draw_samples(name, options(lengths=(512,), limit=3, seed=43))
    assert all(a.context != b.context for a, b in zip(other, many[5:8], strict=True))


def test_the_official_number_of_samples(options: Options) -> None:
    assert len(draw_samples("niah_single_1", options(lengths=(512,), limit=None))) == 500
    assert len(draw_samples("qa_2", options(lengths=(512,), limit=None))) == 30


@pytest.mark.parametrize("name", NAMES)
def test_the_question_is_not_in_the_context(name: str, options: Options) -> None:
    for sample in draw_samples(name, options(lengths=(512,))):
        asked = sample.question.rsplit("\n", 1)[-1]
        if name != "cwe":  # its worked example asks the same question
            assert asked not in sample.context
        assert sample.context.rsplit("\n", 1)[-1] == ""


@pytest.mark.parametrize("name", [*NEEDLES, "vt"])
def test_needles_stand_in_the_context_verbatim(name: str, options: Options) -> None:
    for sample in draw_samples(name, options(lengths=(512, 1024))):
        needles = sample.meta["needles"]
        assert len(needles) == len(sample.answers)
        for needle, answer in zip(needles, sample.answers, strict=True):
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
    for sample in draw_samples(name, options(lengths=(1024,))):
        assert sorted(found_values(sample, row.values)) == sorted(sample.answers)
        assert len(set(sample.answers)) == row.q * row.v
        assert all(re.fullmatch(pattern[row.values], answer) for answer in sample.answers)
        needles = sample.context.count("One of the special magic")
        assert needles > 10 if row.haystack == "needle" else needles == row.k * row.v
        assert (NOISE in sample.context) == (row.haystack == "noise")


def test_one_needle_is_spoken_of_in_the_singular(options: Options) -> None:
    sample = draw_samples("niah_single_1", options(lengths=(512,)))[0]
    key = sample.question.removeprefix("What is the special magic number for ").split(" mentioned")[0]
    assert re.fullmatch(r"\S+-.+", key)
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert sample.question == f"What is the special magic number for {key} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert sample.meta["needles"] == [f"One of the special magic numbers for {key} is: {sample.answers[0]}."]
    lines = sample.context.split("\n")[1:-1]
    assert Counter(lines) == {NOISE: len(lines) - 1, sample.meta["needles"][0]: 1}
    uuid = draw_samples("niah_single_3", options(lengths=(512,)))[0]
    assert uuid.question.startswith("What is the special magic uuid for ")
    assert "about the uuid afterwards." in uuid.context


def test_several_needles_are_spoken_of_in_the_plural(options: Options) -> None:
    sample = draw_samples("niah_multiquery", options(lengths=(512,)))[0]
    keys = [re.sub(r".* for (.*) is: .*", r"\1", needle) for needle in sample.meta["needles"]]
    query = f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    assert sample.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\nThe "
    )
    assert sample.question == f"What are all the special magic numbers for {query} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic numbers for {query} mentioned in the provided text are"
    values = draw_samples("niah_multivalue", options(lengths=(512,)))[0]
    assert values.question.startswith("What are all the special magic numbers for ")
    assert len({needle.split(" is: ")[0] for needle in values.meta["needles"]}) == 1


def test_depths_are_forty_points_and_reach_the_text(options: Options) -> None:
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40)).astype(int).tolist()
    for sample in draw_samples("niah_single_2", options(lengths=(4096,), limit=20)):
        text = sample.context.split("\n", 1)[1]
        place = text.index(sample.meta["needles"][0])
        assert sample.meta["depth"] == pytest.approx(100 * place / len(text), abs=2)
        assert place == 0 or text[:place].endswith(". ")
    depths = [sample.meta["depth"] for sample in draw_samples("niah_single_1", options(lengths=(4096,), limit=40))]
    assert min(depths) < 25
    assert max(depths) > 75


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
    order = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        "value {}, they are: "
    )
    for sample in draw_samples("vt", options(lengths=(length,))):
        empty, example, asked = sample.context.split(order)
        value = sample.question[-24:].split()[0]
        assert empty == ""
        assert sample.question == f"Question: Find all variables that are assigned the value {value} in the text above."
        assert sample.answer_prefix == prefix.format(value)
        assert assigned(asked, value) == list(sample.answers)
        assert all(re.fullmatch("[A-Z]{5}", answer) for answer in sample.answers)
        text, question, solved = re.split(r"\n(?=Question)|(?<=above\.)(?= Answer)", example)
        shown = question.split()[-5]
        names = assigned(text, shown)
        assert len(names) == 5
        assert all(re.fullmatch("[A-Z]{3}", name) for name in names)
        assert solved == prefix.format(shown) + " " + " ".join(names) + "\n\n"
        assert shown != value
        assert len(Words().encode(example)) <= 500
        assert set(asked.split("\n")) - {""} <= {NOISE, *NOISE.replace(". ", ".\n").split("\n"), *chain_lines(sample)}


def chain_lines(sample: Sample) -> set[str]:
    first, *hops = sample.meta["needles"]
    return {first, *(f"{hop} " for hop in hops)}


@pytest.mark.parametrize(("length", "common", "rare"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_ten_most_frequent(length: int, common: int, rare: int, options: Options) -> None:
    order = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "Question: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    for sample in draw_samples("cwe", options(lengths=(length,))):
        assert (sample.question, sample.answer_prefix) == (question, prefix)
        empty, example, asked = sample.context.split(order)
        assert empty == ""
        seen = numbered(asked)
        assert set(seen.values()) == {common, rare}
        assert {word for word, times in seen.items() if times == common} == set(sample.answers)
        assert len(sample.answers) == 10
        shown, solved = example.split(f"\n{question}{prefix} ")
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
    prompt = CommonWords().build(pool + 50, length=131072, index=0, draw=random.Random(3))
    assert prompt.meta["pairs"] == 50
    assert len(numbered(prompt.context.split("\n")[-2])) == pool + 50


@pytest.mark.parametrize("length", [512, 4096])
def test_frequent_words_are_ranks_two_to_four(length: int, options: Options) -> None:
    order = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    for sample in draw_samples("fwe", options(lengths=(length,))):
        assert sample.context.startswith(order)
        assert sample.question == (
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?"
        )
        assert sample.answer_prefix == (
            " Answer: According to the coded text above, the three most frequently appeared words are:"
        )
        ranked = Counter(sample.context.removeprefix(order).split()).most_common()
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == list(sample.answers)
        assert ranked[3][1] > ranked[4][1]
        assert ranked[0][1] / ranked[1][1] == pytest.approx(4, rel=0.1)  # rank ** -2
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents_hold_the_answer(name: str, options: Options) -> None:
    order = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    for sample in draw_samples(name, options(lengths=(1024,), limit=20)):
        assert sample.context.startswith(f"{order}\n\nThe following are given documents.\n\nDocument 1:\n")
        assert sample.question.startswith(f"{order}\n\nQuestion: W")
        assert sample.answer_prefix == " Answer:"
        texts = re.split(r"\n\nDocument \d+:\n", sample.context)[1:]
        assert len(texts) == len(set(texts)) == sample.meta["documents"]
        holding = [i for i, text in enumerate(texts) if re.search(rf"\b{sample.answers[0]}\b", text)]
        assert len(holding) == 1
        if name == "qa_1":
            assert sample.meta["depth"] == round(100 * holding[0] / (len(texts) - 1))
        else:
            assert texts[holding[0]].startswith("Title ")
        assert "Refused?" not in sample.question


def test_the_answer_moves_between_samples(options: Options) -> None:
    depths = {sample.meta["depth"] for sample in draw_samples("qa_1", options(lengths=(1024,), limit=20))}
    assert len(depths) > 5


@pytest.mark.parametrize(("name", "needed"), [("qa_1", "SQuAD"), ("qa_2", "HotpotQA")])
def test_missing_and_damaged_question_files(name: str, needed: str, options: Options, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"no data folder was given: put {needed}"):
        draw_samples(name, options(data_dir=None))
    with pytest.raises(TaskError, match=f"no {'squad' if name == 'qa_1' else 'hotpot'}.* in .*: put {needed}"):
        draw_samples(name, options(data_dir=tmp_path))
    for text in ("{", "[3]", "{}", '{"data": [{}]}'):
        (tmp_path / "squad.json").write_text(text)
        (tmp_path / "hotpot.json").write_text(text)
        with pytest.raises(TaskError, match=r"does not have the shape of|holds no answerable question"):
            draw_samples(name, options(data_dir=tmp_path))


def test_a_question_that_cannot_fit_is_passed_over(options: Options, tmp_path: Path) -> None:
    rows = hotpot(random.Random(2))
    rows[1]["context"][0][1] = ["word " * 600]
    (tmp_path / "hotpot.json").write_text(json.dumps(rows))
    samples = draw_samples("qa_2", options(data_dir=tmp_path, lengths=(512,), limit=3))
    assert [sample.meta["item"] for sample in samples] == [0, 2, 3]
    assert [sample.id for sample in samples] == ["512/0", "512/1", "512/2"]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_real_questions(name: str, options: Options, shared_data: Path) -> None:
    chosen = options(data_dir=shared_data, lengths=(4096,), limit=10)
    for sample in draw_samples(name, chosen):
        assert any(answer in sample.context for answer in sample.answers) or sample.answers[0] in ("yes", "no")
        assert len(Words().encode(user_message(sample))) + 32 <= 4096
    assert len(TASKS[f"ruler/{name}"].provenance(chosen)["sha256"]) == 64


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_small_names_the_smallest_one(name: str, options: Options) -> None:
    with pytest.raises(TaskError, match="128 tokens are too few; the smallest length that works is") as error:
        TASKS[f"ruler/{name}"].samples(options(lengths=(128,)))
    smallest = int(str(error.value).rsplit(" ", 1)[1])
    assert len(draw_samples(name, options(lengths=(smallest,), limit=30 if name != "qa_2" else 20))) >= 20
    with pytest.raises(TaskError, match="too few"):
        TASKS[f"ruler/{name}"].samples(options(lengths=(smallest - 64,)))


def test_a_length_beyond_the_run_is_refused(options: Options) -> None:
    with pytest.raises(TaskError, match="length 1024 exceeds the 1000 tokens"):
        TASKS["ruler/vt"].samples(options(lengths=(512, 1024), max_tokens=1000))


@pytest.mark.parametrize("name", NAMES)
def test_provenance_is_json_and_names_what_differs(name: str, options: Options) -> None:
    said = json.dumps(TASKS[f"ruler/{name}"].provenance(options()))
    assert "NVIDIA/RULER@c3f5e3b" in said
    assert ("169 web pages" in said) == (name in NAMES and name in ROWS and ROWS[name].haystack == "essay")


def test_short_essays_start_over() -> None:
    essays = Essays(text="One two. Three four five! Six", files=1)
    assert essays.sentences == ["One two.", "Three four five!", "Six"]
    assert essays.head(4) == ["One two.", "Three four"]
    assert essays.head(5) == ["One two.", "Three four five!"]
    assert " ".join(essays.head(14)) == "One two. Three four five! Six One two. Three four five! Six One two."


@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.integers(0, 2000), st.integers(1, 9))
def test_the_search_equals_a_linear_scan(costs: list[int], room: int, least: int) -> None:
    def spare(units: int) -> int:
        return room - sum(costs[i % len(costs)] for i in range(units))

    if spare(least) < 0:
        return
    expected = least
    while spare(expected + 1) >= 0:
        expected += 1
    assert fit.largest(spare, least) == expected


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 3000))
def test_a_sample_shrinks_until_it_fits(units: int, cost: int, room: int) -> None:
    def build(size: int) -> fit.Prompt:
        return fit.Prompt(context="x" * 4 * cost * size, question="", answer_prefix="", answers=("a",))

    prompt = fit.shrink(build, lambda p: room - len(p.context) // 4, units=units, least=1)
    best = min(units, room // cost)
    assert (prompt is None) == (best < 1)
    if prompt is not None:
        assert best - 1 <= len(prompt.context) // 4 // cost <= best
