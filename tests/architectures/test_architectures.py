"""docs/architectures.md says what every architecture does, and what checks them notices what is wrong."""

from typing import Any

import pytest
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness.engine.transformers_seam import ATTENTION
from tests.architectures import check as checked
from tests.architectures.check import WrongError, check
from tests.architectures.page import PAGE, kinds, page, row_of, written

VERSION, ROWS = written()
of_that_version = pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"the page is of {VERSION}")


@of_that_version
@pytest.mark.parametrize("kind", ROWS)
def test_the_page_says_what_the_harness_does(kind: str) -> None:
    assert row_of(check(kind)) == ROWS[kind], "run python -m tests.architectures --write"


@of_that_version
def test_the_page_has_every_type_and_nothing_else() -> None:
    assert list(ROWS) == kinds()
    assert page(ROWS.values()) == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "name", "other"), [("gpt_oss", "s_aux", None), ("gemma2", "softcap", None)])
def test_an_argument_passed_over_is_noticed(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, other: Any) -> None:
    registered = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    without = lambda *args, **kwargs: registered(*args, **kwargs | {name: other})  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION, without)
    with pytest.raises(WrongError, match=f"{kind}: logits after the prompt differ"):
        check(kind)


def test_a_budget_that_is_not_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked.SnapKV, "select", lambda self, view, budget: view.kv.positions[..., : budget - 1])
    with pytest.raises(WrongError, match="llama: bytes are"):
        check("llama")
