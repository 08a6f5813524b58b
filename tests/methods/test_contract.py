"""What every registered method and preset must keep to, and the nouns and the registry that methods are built from."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.compiler.asked import TRIALS
from harness.compiler.tune import parameter_space
from harness.contract import check_method, make_view
from methods.base import Budget, KVPolicy, Needs, PolicyError, best, spread
from methods.coded import CodedPolicy
from methods.registry import METHODS, load_methods, make_policy, method
from methods.window import PooledPolicy
from tests.methods.loops import GOLDEN

LABELS = [
    label
    for name, entry in load_methods().items()
    if entry.policy.__module__.startswith("methods.")
    for label in (name, *(f"{name}@{preset}" for preset in entry.presets))
    if label != "recalkv@paper"  # which runs the prompt through a model again
]
BY_DESIGN = {
    "compilerkv": ("a_whole_prompt_is_kept",),  # a gate drops tokens at any budget
    "finch": ("keys_are_the_prompts",),
    "h2o@paper": ("a_whole_prompt_is_kept",),  # its sums cost slots
    "rkv": ("a_whole_prompt_is_kept",),  # so do its scores
    "streamingllm@paper": ("keys_are_the_prompts",),
    "streamingllm@reassign": ("keys_are_the_prompts",),
}


@pytest.mark.parametrize("label", LABELS)
def test_the_contract(label: str) -> None:
    name = label.partition("@")[0]
    entry = METHODS[name]
    coded = ("values_are_the_prompts", "keys_are_the_prompts") if issubclass(entry.policy, CodedPolicy) else ()
    check_method(label, without=BY_DESIGN.get(label, BY_DESIGN.get(name, coded)))
    assert entry.paper.startswith("https://arxiv.org/abs/") or entry.paper == "control, no paper"
    assert name in {entry.policy.__module__.split(".")[i] for i in (1, -1)}


@pytest.mark.parametrize("name", ["snapkv", "adakv", "dynamickv", "chunkkv", "expected_attention"])
def test_too_few_observed_queries_are_reported(name: str) -> None:
    policy = make_policy(name, {"window" if name == "expected_attention" else "recent": 32})
    with pytest.raises(PolicyError, match=r"32 window queries wanted, 4 observed.*needs"):
        policy.compress(make_view(40, Needs(window=4)), 38)


def test_missing_column_sums_are_reported() -> None:
    with pytest.raises(PolicyError, match="column sums"):
        make_policy("h2o").compress(make_view(40, Needs(window=4)), 8)


def test_needs_add_up() -> None:
    both = Needs(window=8, column_sums=True) | Needs(window=32, logprobs=True)
    assert both == Needs(window=32, column_sums=True, logprobs=True)


EQUAL = st.sampled_from([-math.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1e-7, 0.5, 0.50000006, 3.0, math.inf])


@given(
    rows=st.lists(
        st.lists(EQUAL | st.floats(width=32, allow_nan=False), min_size=9, max_size=9), min_size=1, max_size=3
    ),
    count=st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_best_are_those_of_a_stable_sort(rows: list[list[float]], count: int, dtype: torch.dtype) -> None:
    scores = torch.tensor(rows, dtype=dtype)
    for seen in (scores, scores[:, 1:8]):  # a part of it, as between sinks and recent tokens
        ranked = [sorted((-score, t) for t, score in enumerate(row)) for row in seen.tolist()]
        assert best(seen, count).tolist() == [[t for _, t in row[:count]] for row in ranked]
    many = (torch.arange(2000) % 7 / 4096).to(dtype)  # each worth many times
    assert torch.equal(best(many, 300), many.sort(descending=True, stable=True).indices[:300])


@given(
    total=st.integers(0, 4000),
    weights=st.lists(st.just(0.0) | st.floats(1e-5, 1e3), min_size=1, max_size=40).filter(any),
    cap=st.integers(1, 300) | st.just(4001),
)
def test_spread_gives_out_the_total_in_proportion_and_under_the_cap(total: int, weights: list[float], cap: int) -> None:
    shares = spread(total, weights, cap)
    assert sum(shares) == min(total, cap * sum(weight > 0 for weight in weights))
    assert all(0 <= share <= cap and (share == 0 or weight > 0) for share, weight in zip(shares, weights, strict=True))
    if cap > total:
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


def test_spread_hands_what_a_full_share_cannot_hold_to_the_others() -> None:
    assert spread(10, [8, 1, 1], 4) == [4, 3, 3]
    assert spread(7, [1, 1, 1], 9) == [3, 2, 2]


@pytest.mark.parametrize(
    ("text", "prompt", "slots"),
    [("128", 1000, 128), ("0.25", 1000, 250), ("25%", 1000, 250), (" 1.0 ", 7, 7), ("100%", 7, 7), ("0.001", 10, 1)],
)
def test_budgets_are_tokens_or_a_fraction(text: str, prompt: int, slots: int) -> None:
    assert Budget.parse(text).resolve(prompt) == slots
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


def test_what_is_no_budget_is_refused() -> None:
    for text in ("", "many", "0", "-5", "0.0", "-0.5", "1.5", "150%", "0%", "%", "1e3", "nan", "."):
        with pytest.raises(PolicyError, match=r"budget .*(write|ask for)"):
            Budget.parse(text)
    for arguments in ({}, {"tokens": 4, "fraction": 0.5}):
        with pytest.raises(PolicyError, match="tokens or a fraction"):
            Budget(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("label", "overrides", "message"),
    [
        ("snapvk", {}, "unknown method 'snapvk'; did you mean 'snapkv'.*known: .*h2o"),
        ("snapkv@papre", {}, "unknown preset 'papre' of snapkv; did you mean 'paper'"),
        ("random@paper", {}, "unknown preset 'paper' of random; known: none"),
        ("snapkv", {"kernal": 5}, "snapkv has no parameter 'kernal'; did you mean 'kernel'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(label: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_policy(label, overrides)


def test_overrides_come_on_top_of_a_preset() -> None:
    assert make_policy("snapkv@kvcf", {"kernel": 5}) == make_policy("snapkv", {"recent": 8, "kernel": 5, "pool": "max"})


TUNABLE = [name for name, entry in load_methods().items() if entry.tunable]
NOT_CHOSEN = {"leverage": ["seed"], "cur": ["seed"], "finch": ["rerotate"], "rkv": ["buffer", "evict"]}
"""Parameters that presets may differ in and no choice is among: chance, and what no prompt's cache shows."""


@pytest.mark.parametrize("name", TUNABLE)
def test_a_method_can_be_tuned_from_its_own_values_on(name: str) -> None:
    entry = METHODS[name]
    choices = {parameter: tuple(values) for parameter, values in entry.choices.items()}
    pools = {"kernel", "pool", "forward"} if issubclass(entry.policy, PooledPolicy) else set()
    assert pools < choices.keys() <= {*entry.parameters} - {*NOT_CHOSEN.get(name, ())} and "evict" not in choices
    assert len(parameter_space(entry)) >= TRIALS
    for label in (name, *(f"{name}@{preset}" for preset in entry.presets)):
        policy = make_policy(label)
        assert all(getattr(policy, key) in values for key, values in choices.items()), label
    tried = {(key, value): make_policy(name, {key: value}) for key, values in choices.items() for value in values}
    assert all(getattr(policy, key) == value for (key, value), policy in tried.items())
    assert all(len(set(values)) == len(values) > 1 for values in choices.values())


def test_a_taken_name_is_refused() -> None:
    before = METHODS["snapkv"]
    with pytest.raises(PolicyError, match="'snapkv' of .* has a name that is taken"):
        method("snapkv", paper="none")(type("Other", (KVPolicy,), {}))
    assert METHODS["snapkv"] is before


BELOW = {
    **{"h2o": [("recent_share", -0.5)], "adakv": [("safeguard", -0.1)]},
    "expected_attention": [("safeguard", 1.5), ("kernel", 2)],
}
OUT_OF_RANGE = {
    **{"snapkv": {"kernel": 4, "recent": 0}, "snapkv_shared": {"kernel": 0}, "pyramidkv": {"beta": 0}},
    **{"h2o": {"recent_share": 1.5, "recent": -1}, "streamingllm": {"sinks": -2}, "random": {"recent": -1}},
    **{
        "compilerkv": {"window": 0},
        "adakv": {"recent": 0, "safeguard": 1.5, "kernel": 4},
        "tova": {"recent": -1, "kernel": 2},
    },
    **{
        "dynamickv": {"ratio": 0.5, "kernel": 2, "recent": 0},
        "chunkkv": {"chunk": 0, "kernel": 6},
        "knorm": {"skip": -1},
    },
    "expected_attention": {"window": 0, "future": 0, "sinks": -1, "safeguard": -0.1},
    "keydiff": {"block": -1, "sinks": -1, "kernel": 0},
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_parameters_out_of_range_are_refused(name: str) -> None:
    for parameter, value in [*OUT_OF_RANGE[name].items(), *BELOW.get(name, [])]:
        with pytest.raises(PolicyError, match=f"{parameter}={value}"):
            make_policy(name, {parameter: value})


def test_every_method_has_a_golden_test() -> None:
    """A new built-in method must have its loops in `tests.methods.loops`, or in a file of its own name."""
    built_in = {name for name, entry in load_methods().items() if entry.policy.__module__.startswith("methods.")}
    covered = {label.partition("@")[0] for label, *_ in GOLDEN} | {"expected_attention"}  # test_golden
    own = {name for name in built_in if (Path(__file__).parent / f"test_{name}.py").is_file()}  # `harness new-method`
    assert built_in == covered | own
