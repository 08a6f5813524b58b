"""The packaged claims are sound data, verdicts follow from bounds and intervals, and docs/claims.md shows them."""

import inspect
import math
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.boards.sources import BOARDS, KEPT
from harness.claims.arithmetic import (
    FORMULAS,
    bytes_ratio,
    gib,
    least_batch,
    mean_layer_ratio,
    removed_gap,
    step_saved_percent,
)
from harness.claims.claim import Arithmetic, Check, Claim, Elsewhere, Found, Property, Records, choose, load_claims
from harness.claims.properties import PROPERTIES
from harness.claims.published import contrast
from harness.claims.tables import to_markdown
from harness.claims.verdict import Verdict, find, judge, word
from harness.cli.parser import command_line
from harness.errors import HarnessError
from methods.registry import make_policy

CLAIMS = load_claims()
published = pytest.mark.skipif(not KEPT.is_dir(), reason="an installed package has no records")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "claims.md"


def of_kind(kind: type) -> list[Any]:
    return [pytest.param(claim, id=claim.id) for claim in CLAIMS if isinstance(claim.check, kind)]


def bounded(low: float = -math.inf, high: float = math.inf) -> Arithmetic:
    return Arithmetic(kind="arithmetic", formula="kept_percent", at_least=low, at_most=high)


def test_there_are_claims_of_many_papers_and_of_this_project_s_subject_first() -> None:
    assert len(CLAIMS) >= 25 and CLAIMS[0].paper.startswith("https://arxiv.org/abs/2602.08686")
    assert len({claim.method for claim in CLAIMS}) >= 15


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.id for claim in CLAIMS])
def test_every_preset_exists_and_every_command_parses(claim: Claim) -> None:
    make_policy(claim.preset)
    for command in claim.checked_by.split(" && "):
        program, *words = shlex.split(command)
        assert program == "harness"
        asked = command_line().parse_args(words)
        for label in getattr(asked, "methods", None) or ():
            make_policy(label)
        if board := getattr(asked, "config", None):
            assert (BOARDS / f"{board}.toml").is_file()
        if words[0] == "claims":
            assert isinstance(claim.check, Arithmetic | Property)


@pytest.mark.parametrize("claim", of_kind(Arithmetic))
def test_every_formula_takes_what_its_claims_give(claim: Claim) -> None:
    assert isinstance(claim.check, Arithmetic)
    inspect.signature(FORMULAS[claim.check.formula]).bind(**claim.check.given)
    assert math.isfinite(find(claim.check).value)


@pytest.mark.parametrize("claim", of_kind(Property))
def test_every_property_takes_what_its_claims_give(claim: Claim) -> None:
    assert isinstance(claim.check, Property)
    inspect.signature(PROPERTIES[claim.check.property]).bind(**claim.check.given)
    found = find(claim.check)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("claim", of_kind(Records))
def test_every_comparison_is_of_cells_that_its_board_has(claim: Claim) -> None:
    found = find(claim.check)
    assert found.n or "are published here" in found.why


@pytest.mark.parametrize(
    ("check", "found", "said"),
    [
        (bounded(0.0), Found(2.0, 0.5, 3.5, 40), "holds"),
        (bounded(0.0), Found(2.0, 0.0, 3.5, 40), "holds"),
        (bounded(0.0), Found(2.0, -0.5, 4.5, 40), "cannot be told"),
        (bounded(0.0), Found(-2.0, -4.5, 0.0, 40), "cannot be told"),
        (bounded(0.0), Found(-2.0, -3.5, -0.5, 40), "does not hold"),
        (bounded(high=0.0), Found(2.0, 0.5, 3.5, 40), "does not hold"),
        (bounded(5.0, 6.0), Found(5.5, 4.0, 7.0, 40), "cannot be told"),
        (bounded(5.0, 6.0), Found.exactly(5.73), "holds"),
        (bounded(5.0, 6.0), Found.exactly(2.67), "does not hold"),
        (bounded(0.0), Found(9.0, 8.0, 10.0, 9, "has 9 contexts"), "cannot be told"),
        (bounded(0.0), Found(9.0, n=3), "cannot be told"),
        (bounded(0.0), Found(why="no records"), "cannot be checked here"),
        (Elsewhere(kind="elsewhere", why="needs a GPU"), Found(why="needs a GPU"), "cannot be checked here"),
    ],
)
def test_the_verdict_is_how_the_interval_lies_to_the_bounds(check: Check, found: Found, said: str) -> None:
    assert word(check, found) == said


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Found(2.0, 0.1, 3.5, 40), "holds"),
        (Found(2.0, 0.0, 3.5, 40), "cannot be told"),
        (Found(0.0, 0.0, 0.0, 40), "cannot be told"),
        (Found(-2.0, -3.5, 0.0, 40), "cannot be told"),
        (Found(-2.0, -3.5, -0.1, 40), "does not hold"),
    ],
)
def test_a_difference_must_be_on_one_side_of_the_bound_and_equal_cells_tell_nothing(found: Found, said: str) -> None:
    assert word(records("graded", ("a", "1"), ("b", "1")), found) == said


@pytest.mark.parametrize("bounds", [{}, {"at_least": 2.0, "at_most": 1.0}, {"at_least": math.nan}])
def test_a_check_without_bounds_that_can_fail_is_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="hold nothing or everything"):
        Arithmetic(kind="arithmetic", formula="gib", **bounds)


def test_arithmetic_by_hand() -> None:
    """Qwen2-7B: 2 x 28 x 4 x 128 numbers of 2 bytes a token are 56 KiB; 16 x 32k of them 28 GiB."""
    assert gib(shape="qwen2-7b", tokens=32768, batch=16) == pytest.approx(28 + 7.62e9 * 2 / 2**30)
    assert step_saved_percent(shape="llama-3-8b", tokens=32768, slots=512, batch=1) == pytest.approx(20.8, abs=0.1)
    assert least_batch(shape="llama-3-8b", tokens=32768, slots=512, percent=60) == 6
    assert least_batch(shape="llama-3-8b", tokens=1024, slots=512, percent=60) == 0
    assert mean_layer_ratio(shares=(0.5, 0.5), bits=(8, 4), against=32) == (4 + 8) / 2
    assert bytes_ratio(shares=(0.5, 0.5), bits=(8, 0), against=16) == 16 / 4
    assert removed_gap(kept=(0.5, 0.4, 0.3), group=512, step=32) == pytest.approx(100 * (0.4 - 192 / 512))


def test_properties_tell_methods_apart_that_do_not_have_them() -> None:
    golden = next(claim.check for claim in CLAIMS if claim.id == "compilerkv-golden")
    assert isinstance(golden, Property)
    given = golden.given
    assert PROPERTIES["compilerkv_golden"](**{**given, "kept": (0, 1)}) == math.inf
    assert PROPERTIES["compilerkv_golden"](**{**given, "scores": (0.75, 2.25, 1.5)}) == pytest.approx(0.1875)
    assert PROPERTIES["layer_ratio"](label="snapkv", tokens=2000, budget=200) == 1.0
    assert PROPERTIES["oldest_recent"](label="random", tokens=500, budget=64) < 60
    assert PROPERTIES["least_head_percent"](label="snapkv", tokens=1000, budget=128) == 100.0
    assert PROPERTIES["stored_bits"](label="fullkv", tokens=64) == 16.0
    bound = PROPERTIES["distortion_percent_of_bound"]
    above = bound(label="turboquant@bits2", bits=3, tokens=256)
    assert isinstance(above, float) and above > 100


@published
def test_a_comparison_is_the_paired_one_of_the_board() -> None:
    rows = pd.read_csv(KEPT.parent / "graded.csv").set_index(["method", "budget"])
    row = rows.loc["compilerkv", "128"]
    for measure, column in (("score", "score_points"), ("nll", "nll_nats")):
        found = contrast(records("graded", ("compilerkv", "128"), ("snapkv", "128"), measure=measure))
        told = [row[f"{column}_vs_snapkv_{part}"] for part in ("mean", "low", "high", "n")]
        assert (found.value, found.low, found.high, found.n) == pytest.approx(told) and not found.why


@published
def test_a_share_of_the_second_is_subtracted_and_tasks_can_be_chosen() -> None:
    full = ("fullkv", "full")
    whole, half, none = (contrast(records("graded", full, full, share)) for share in (1.0, 0.5, 0.0))
    assert whole.value == 0.0 < half.value == pytest.approx(none.value / 2)
    some = records("graded", full, ("snapkv", "64"), tasks=("graded/retrieval", "graded/keys"))
    assert 0 < contrast(some).n < half.n


@published
def test_a_board_of_few_contexts_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    check = records("graded", ("compilerkv", "128"), ("snapkv", "128"))
    assert word(check, contrast(check)) == "holds"
    monkeypatch.setattr("harness.claims.published.CONTEXTS", 1000)
    found = contrast(check)
    assert found.low > 0 and "contexts, 1000 are needed" in found.why and word(check, found) == "cannot be told"


def test_a_board_that_is_not_published_and_a_cell_that_is_not_there() -> None:
    assert "no records of board nobody" in contrast(records("nobody", ("a", "1"), ("b", "1"))).why
    if KEPT.is_dir():
        check = records("graded", ("snapkv", "65"), ("fullkv", "full"))
        assert contrast(check).why == "board graded has no table with snapkv at 65 and fullkv at full"
        assert word(check, contrast(check)) == "cannot be checked here"


def records(board: str, first: tuple[str, str], second: tuple[str, str], share: float = 1.0, **more: Any) -> Records:
    return Records(kind="records", board=board, first=first, second=second, share=share, at_least=0.0, **more)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id = 'a'", "claim 'a': option paper: Field required"),
        ("id = 'A b'", "claim 'A b'"),
        ("", "claim None"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text(f"title = 'some'\n[[claim]]\n{text}\n")
    with pytest.raises(HarnessError, match=r"some\.toml, ") as raised:
        load_claims(tmp_path)
    assert told in str(raised.value) or "option" in str(raised.value)


def test_claims_are_chosen_by_id_and_by_paper() -> None:
    assert [claim.id for claim in choose(CLAIMS, ["gqa-ratio", "gqa-ratio"])] == ["gqa-ratio"]
    by_method, by_number = choose(CLAIMS, [], "snapkv"), choose(CLAIMS, [], "2404.14469")
    assert {claim.id for claim in by_number} < {claim.id for claim in by_method}
    assert "compilerkv-oom-qwen" in {claim.id for claim in choose(CLAIMS, [], "compilerkv")}


@published
def test_the_page_is_what_the_claims_say() -> None:
    if to_markdown(list(judge(CLAIMS))) + "\n" != PAGE.read_text(encoding="utf-8"):
        pytest.fail("docs/claims.md is not what the data, the code and the published records say; run make docs")


def test_a_verdict_of_the_page_has_its_claim_its_number_and_its_command() -> None:
    claim = next(claim for claim in CLAIMS if claim.id == "qkvcomm-5-6-bfloat16")
    row = to_markdown([Verdict(claim, "does not hold", find(claim.check))]).splitlines()[-1]
    assert row.startswith("| `qkvcomm-5-6-bfloat16` |") and row.endswith("| `harness claims qkvcomm-5-6-bfloat16` |")
    assert "| 2.67 | does not hold |" in row


def test_a_loss_is_shown_with_its_sign() -> None:
    claim = next(claim for claim in CLAIMS if claim.id == "headkv-97-percent")
    row = to_markdown([Verdict(claim, "does not hold", Found(-23.0, -27.5, -18.4, 260))]).splitlines()[-1]
    assert "| -23.0 [-27.5, -18.4], n 260; " in row
