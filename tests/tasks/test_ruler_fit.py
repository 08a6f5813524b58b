"""RULER's lengths: prompts fill them and fit, draws depend on the seed and the id alone, answers spread over depth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.base import TASKS, TaskError
from tasks.ruler import family as fit
from tests.task_data import RULER, Options, Words, draw_samples, user_message

GENERATION = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
ONE_ANSWER = [
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "qa_1",
]


@pytest.mark.parametrize(("length", "template"), [(512, 12), (1024, 150), (4096, 12)])
@pytest.mark.parametrize("name", RULER)
def test_prompt_and_generation_fill_the_length_and_fit(name: str, length: int, template: int, options: Options) -> None:
    chosen = options(lengths=(length,), limit=6, tokenizer=Words(template_tokens=template))
    samples = draw_samples(f"ruler/{name}", chosen)
    assert len(samples) == 6
    for sample in samples:
        assert sample.max_new_tokens == GENERATION.get(name, 128)
        prompt = len(chosen.tokenizer.encode(user_message(sample))) + len(chosen.tokenizer.encode(sample.answer_prefix))
        total = prompt + chosen.tokenizer.template_tokens + sample.max_new_tokens
        assert 0.85 * length < total <= length
        assert sample.meta["prompt_tokens"] == total - sample.max_new_tokens
        assert sample.meta["length"] == length


@pytest.mark.parametrize("name", RULER)
def test_samples_depend_on_the_seed_and_their_id_alone(name: str, options: Options) -> None:
    many = draw_samples(f"ruler/{name}", options(lengths=(1024, 768), limit=5))
    if not name.startswith("qa"):
        assert [sample.id for sample in many] == [f"{length}/{i}" for length in (1024, 768) for i in range(5)]
    assert many == draw_samples(f"ruler/{name}", options(lengths=(1024, 768), limit=5, tokenizer=Words()))
    assert draw_samples(f"ruler/{name}", options(lengths=(768,), limit=3)) == many[5:8]
    assert len({user_message(sample) for sample in many}) == 10
    other = draw_samples(f"ruler/{name}", options(lengths=(768,), limit=3, seed=43))
    assert all(a.context != b.context for a, b in zip(other, many[5:8], strict=True))


@pytest.mark.parametrize("name", ONE_ANSWER)
def test_the_first_answers_are_spread_over_depth(name: str, options: Options) -> None:
    depths = [sample.meta["depth"] for sample in draw_samples(f"ruler/{name}", options(lengths=(4096,), limit=16))]
    for first in (4, 8, 16):
        quarters = [sum(25 * q <= min(depth, 99) < 25 * q + 25 for depth in depths[:first]) for q in range(4)]
        assert all(abs(in_quarter - first / 4) <= 1 for in_quarter in quarters), (first, depths)


def test_the_official_number_of_samples(options: Options) -> None:
    assert len(draw_samples("ruler/niah_single_1", options(lengths=(512,), limit=None))) == 500
    assert len(draw_samples("ruler/qa_2", options(lengths=(512,), limit=None))) == 30


@pytest.mark.parametrize("name", RULER)
def test_a_length_that_is_too_small_names_the_smallest_one(name: str, options: Options) -> None:
    with pytest.raises(TaskError, match="128 tokens are too few; the smallest length that works is") as error:
        TASKS[f"ruler/{name}"].samples(options(lengths=(128,)))
    smallest = int(str(error.value).rsplit(" ", 1)[1])
    assert len(draw_samples(f"ruler/{name}", options(lengths=(smallest,), limit=20))) == 20
    with pytest.raises(TaskError, match="too few"):
        TASKS[f"ruler/{name}"].samples(options(lengths=(smallest - 64,)))


def test_a_length_beyond_the_run_is_refused(options: Options) -> None:
    with pytest.raises(TaskError, match="length 1024 exceeds the 1000 tokens"):
        TASKS["ruler/vt"].samples(options(lengths=(512, 1024), max_tokens=1000))


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
    def build(size: int) -> fit.FittedPrompt:
        return fit.FittedPrompt(context="x" * 4 * cost * size, question="", answer_prefix="", answers=("a",))

    fitted = fit.shrink(build, lambda p: len(p.context) // 4, room=room, units=units, least=1)
    best = min(units, room // cost)
    assert (fitted is None) == (best < 1)
    if fitted is not None:
        prompt, size = fitted
        assert size == len(prompt.context) // 4 == best * cost
