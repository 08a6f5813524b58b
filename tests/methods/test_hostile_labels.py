"""Labels and budgets as people and files write them: one spelling each, or one clear line."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.errors import checked
from harness.plan.methods import plan_budget, plan_methods
from harness.plan.names import asked_methods
from harness.records.spec import Sweep
from methods.budget import LEAST_FRACTION, MOST_TOKENS, Budget
from methods.label import MethodLabel
from methods.registry import check_method, known_methods, preset_names, read_label
from tests.hostile import tried

pytestmark = pytest.mark.hostile

NAMES = sorted(known_methods())
CALLED = sorted(f"{name}@{preset}" for name, method in known_methods().items() for preset in preset_names(method))
ODD = ("\0", "\x1b", "٣", "а", "ｓ", "\u200b", "\u202e", "\ud800")
LETTERS = st.sampled_from([*string.printable, *"@@@[[]](()),==::..__--", *ODD])
PIECES = st.sampled_from(
    [*NAMES[:4], "kvcf", "paper", "@", "[", "]", "=", ",", "kernel", "5", ":", "kvpress", "(", ")", " ", "\n"]
)
GRAMMAR = st.lists(PIECES, max_size=8).map("".join) | st.text(LETTERS, max_size=30)
VALUE = st.text(string.ascii_letters + string.digits + "./,_ -", min_size=1, max_size=8)
PARAMS = st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), VALUE, max_size=3)


@given(GRAMMAR)
@example("snapkv@")
@example("snapkv" * 40_000)
@example("[" * 10_000)
@example("kvpress:" + "(" * 5000)
@example("kvpress:" + "-" * 8000 + "1")
def test_a_label_is_a_known_method_of_one_spelling_or_refused(text: str) -> None:
    def attempt() -> None:
        label = read_label(text)
        check_method(label, {})
        assert str(label) == text and text in (*NAMES, *CALLED)

    tried("labels", attempt, may_pass=text in NAMES or text in CALLED)


@given(GRAMMAR)
def test_a_label_that_can_be_read_is_what_it_was(text: str) -> None:
    read: list[MethodLabel] = []
    tried("label texts", lambda: read.append(MethodLabel.parse(text)), may_pass=True)
    assert all(str(label) == text == str(MethodLabel.parse(str(label))) for label in read)


@given(st.sampled_from([*NAMES, *CALLED]), PARAMS)
def test_a_label_with_parameters_is_read_again(asked: str, params: dict[str, str]) -> None:
    label = MethodLabel.parse(asked).changed(params)
    assert MethodLabel.parse(str(label)).asked == asked
    if not any("," in value for value in params.values()):
        assert MethodLabel.parse(str(label)) == label


@pytest.mark.parametrize("name", ["snapkv", "snapkv@kvcf"])
@pytest.mark.parametrize(
    "change", [str.upper, str.title, "{}@".format, "{} ".format, " {}".format, "{}\n".format, "{}[]".format]
)
def test_another_spelling_is_no_second_method(name: str, change: object) -> None:
    assert callable(change)
    spelled = change(name)
    tried("spellings", lambda: asked_methods(checked(Sweep, {"methods": [name, spelled], "tasks": ["niah"]})))


def test_a_method_asked_for_twice_is_run_once() -> None:
    assert len(plan_methods(checked(Sweep, {"methods": ["knorm", "knorm"], "tasks": ["niah"]}))) == 1


def test_a_press_has_one_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.kvpress.label.version", {"kvpress": "0.5.5", "transformers": "5.2.0"}.get)
    spelled = (
        "kvpress:SnapKVPress(window_size=8)",
        "kvpress:SnapKVPress( window_size = 8 )",
        "kvpress:SnapKVPress(window_size=8,)",
    )
    assert {str(read_label(text)) for text in spelled} == {spelled[0]}
    assert {str(read_label(text)) for text in ("kvpress:KnormPress", "kvpress:KnormPress()")} == {"kvpress:KnormPress"}


BUDGETS = st.one_of(
    st.text(st.sampled_from("0123456789.%-+eE_ ,x٣½infa"), max_size=12),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(
        ["", " ", "%", "100%", "0%", "1e3", "+5", "1_000", "٣", "inf", "nan", "-0", "0x10", "1.", ".", "9" * 5000]
    ),
)


@given(BUDGETS)
def test_a_budget_is_read_exactly_or_refused(text: str) -> None:
    made: list[Budget] = []
    tried("budgets", lambda: made.append(Budget.parse(text)), may_pass=True)
    for budget in made:
        assert Budget.parse(str(budget)) == budget
        bare = text.strip(" ")
        value = float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
        assert float(str(budget)) == pytest.approx(value, rel=1e-12) and float(str(budget)) > 0


@given(st.floats(LEAST_FRACTION, 1), st.floats(LEAST_FRACTION, 1))
def test_fractions_that_differ_stay_different_and_equal_ones_are_one(one: float, other: float) -> None:
    texts = [str(Budget(fraction=value)) for value in (one, other)]
    assert (texts[0] == texts[1]) == (one == other) and all("e" not in text for text in texts)
    assert [Budget.parse(text).fraction for text in texts] == [one, other] and plan_budget(one) == Budget(fraction=one)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        *(("0.25", "0.25"), ("25%", "0.25"), ("0.250", "0.25"), (".25", "0.25"), ("33.3%", "0.333"), ("1.0", "1.0")),
        *(("100%", "1.0"), ("0.123456", "0.123456"), ("0.0000001", "0.0000001"), ("0.00001%", "0.0000001")),
        *(("007", "7"), ("1.", "1.0")),
    ],
)
def test_a_budget_has_one_text(text: str, kept: str) -> None:
    assert str(Budget.parse(text)) == kept


def test_two_spellings_of_a_budget_are_one_budget() -> None:
    sweep = checked(Sweep, {"methods": ["knorm"], "tasks": ["niah"], "budgets": ["0.25", "25%", "64", "064", "0.250"]})
    assert sweep.parsed_budgets == (Budget(fraction=0.25), Budget(tokens=64))


NAN, INF, HUGE = float("nan"), float("inf"), 10**5000
NONE: tuple[dict[str, float], ...] = ({}, {"tokens": 1, "fraction": 0.5}, {"tokens": True}, {"fraction": True})
TOKENS: tuple[float, ...] = (0, -1, MOST_TOKENS + 1, HUGE)
FRACTIONS = (NAN, INF, 1e-320, -0.0, 1.0000001)


def test_a_budget_out_of_range_cannot_be_made() -> None:
    for parts in (*NONE, *({"tokens": n} for n in TOKENS), *({"fraction": x} for x in FRACTIONS)):
        tried("budgets in Python", lambda parts=parts: Budget(**parts))  # type: ignore[misc]
    for other in (True, None, [], "", NAN, INF, -1, 0, 0.0, 1e-12, HUGE, 128.0, b"128"):
        tried("budgets in Python", lambda other=other: plan_budget(other))  # type: ignore[misc]
