"""docs/method-reference.md is what the files of `methods/` say, and its parts are right."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

from harness.cli import main
from harness.method_reference import OBSERVED, differences, observed, paragraphs, section, slot_bytes
from methods.base import KV, LayerPolicy, LayerView, Needs
from methods.catalogue import catalogue
from methods.registry import METHODS, Method, make_policy, method

PAGE = Path(__file__).resolve().parents[2] / "docs" / "method-reference.md"


def test_the_page_says_what_the_methods_say_in_alphabetical_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "foreign", Method("foreign", Tagged, "control, no paper", {}))
    assert main(["list", "methods", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert re.findall(r"^## (\w+)$", page, re.M) == sorted(catalogue().entries)
    if page.encode() != PAGE.read_bytes():
        pytest.fail("docs/method-reference.md is not what methods/ say; run make docs")


def test_other_lists_have_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "tasks", "--markdown"]) == 2
    assert "not of tasks; write harness list methods --markdown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("A.\n\nSource: x,\ny. Differences: one;\ntwo.\n\nLast.", ["A. Last.", "x, y.", "one; two."]),
        ("A.\n\nSource: x.\nDifference: one.", ["A.", "x.", "one."]),
        ("A.\n\nSource: x. Deliberate differences: one.", ["A.", "x.", "one."]),
        ("A, whose Source is open.", ["A, whose Source is open.", None, None]),
    ],
)
def test_paragraphs_of_a_docstring_are_found_by_label(docstring: str, said: list[str | None]) -> None:
    assert [paragraphs(docstring).get(label) for label in ("", "Source", "Differences")] == said


def test_a_method_in_a_package_has_the_differences_of_all_its_modules() -> None:
    said = differences("methods.compilerkv.policy")
    assert "In `methods.compilerkv.paper`: " in said and "In `methods.compilerkv.tables`: " in said
    assert differences("methods.random") == ""


def test_every_need_has_its_words() -> None:
    assert OBSERVED.keys() == {field.name for field in fields(Needs)}
    assert observed(Needs()) == "nothing"
    assert observed(Needs(window=8, decode_attention=True)) == "the last 8 queries, the attention while decoding"


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("snapkv", "2 x D x 2 + 4 = 260"),
        ("h2o@paper", "2 x D x 2 + 4 = 260 + 4 a slot (`sums`)"),
        ("compilerkv@streaming", "2 x D x 2 + 4 = 260 + 4 a slot (`worth`) + 4 a slot (`seen`) + 4 a head (`slots`)"),
    ],
)
def test_a_slot_takes_its_key_its_value_and_its_side_data(label: str, said: str) -> None:
    assert slot_bytes(make_policy(label)) == said


def test_a_slot_of_codes_takes_codes_and_scales() -> None:
    """By hand: 2 x 64 / 2 of codes, scale and zero of 2 groups a value, of 64 a key for 32 slots; 32 plain ones."""
    said = slot_bytes(make_policy("quant@int4"))
    assert said.startswith(
        "2 x D x 4 / 8 = 64 of codes + 16.0 of scales and zeros + 4; the last 32 of a head are plain; "
    )
    for tokens in (128, 256, 512):
        mean = ((tokens - 32) * (64 + 2 * 2 * 2 + 64 * 2 * 2 / 32) + 32 * 256) / tokens + 4
        assert f"{mean:.1f} at {tokens} tokens" in said


@dataclass
class TaggedKV(KV):
    """Slots that hold a byte more than side data tells."""

    @property
    def nbytes(self) -> int:
        return super().nbytes + int(self.live.sum())


@dataclass(frozen=True)
class Tagged(LayerPolicy):
    """Keeps the first tokens.

    tag: of each slot.
    """

    tag: int = 3

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        kv = view.kv.take(torch.arange(budget).expand(1, 2, budget))
        return TaggedKV(kv.keys, kv.values, kv.positions)


def test_a_section_shows_code_presets_choices_and_a_mean_where_no_formula_holds() -> None:
    code = "https://github.com/some/code at 0123abc"
    own = {"paper": {}, "big": {"tag": 9}}
    try:
        method("tagged", paper="https://arxiv.org/abs/1", code=code, presets=own, choices={"tag": (3, 9)})(Tagged)
        text = section(METHODS["tagged"])
    finally:
        METHODS.pop("tagged", None)
    for line in (
        "- **Keeps:** Keeps the first tokens.",
        "- **Paper:** <https://arxiv.org/abs/1>",
        "- **Authors' code:** [some/code at 0123abc](https://github.com/some/code/tree/0123abc)",
        "- **Observes:** nothing",
        "- **Bytes of a slot:** on average 261.0 at budget 128 (128 slots), 261.0 at budget 256 (256 slots), "
        "261.0 at budget 512 (512 slots)",
        "| parameter | default | `@paper` | `@big` | `harness tune` tries |",
        "| `tag` | `3` |  | `9` | `3`, `9` |",
        "Parameters: tag: of each slot.",
    ):
        assert line in text.splitlines()
