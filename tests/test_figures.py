"""Every number of README.md and docs/ is what its source says, and has a source."""

import json
from functools import cache
from pathlib import Path

import pytest

from tests import figure_sources, figures
from tests.figure_sources import FigureError
from tests.figures import Checkout, line, main, mend, shown, uncovered

PAGES = Checkout.read().pages()
all_shown = cache(lambda: shown(Checkout.read()))
PAGE = """# A page of 2026

`int8` and [board](docs/x9.csv) of SmolLM2-135M: 1,234 prompts score 52.4, `snapkv` 3.3; 0.5
less than before, at 64 slots.

| method | 64 |
| --- | --- |
| `snapkv` | 3.3 |
"""
TABLE = """
[[figure]]
page = "README.md"
says = "{} prompts score {}, `snapkv` {};"
from = ["docs/measured/x.json?made#prompts", "b.csv?method=compilerkv|snapkv&budget=64#score"]

[[figure]]
page = "README.md"
says = "{} less than before"
from = [["/", ["-", "b.csv?method=compilerkv#score", 52.26], 0.2]]
tolerance = 0.25

[[table]]
page = "README.md"
head = "| method | 64 |"
cells = "scores"

[[constant]]
page = "README.md"
says = ["A page of 2026"]
why = "a year"

[[kind]]
pattern = 'at 64 slots'
why = "a budget"
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A page with a figure from a board, one from a measurement, one that is worked out, and a table."""
    files = {
        "README.md": PAGE,
        "docs/figures.toml": TABLE,
        "docs/measured/x.json": json.dumps({"runs": {}, "results": {"made": {"prompts": 1234}}}),
        "leaderboards/published/b.csv": "method,budget,score\ncompilerkv,64,52.36\nsnapkv,64,3.257\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(figure_sources.CELLS, "scores", lambda root, head, row: [row[0], "3.3"])
    return Checkout.read(tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_its_sources_say(page: str) -> None:
    drifted = [line(one) for one in all_shown() if one.page == page and not one.ok]
    assert drifted == [], "read the sentence again, then `python -m tests.figures --mend`"


def test_every_number_of_the_pages_has_a_source() -> None:
    assert uncovered(Checkout.read()) == []


def test_the_readme_and_all_pages_are_read() -> None:
    assert {"README.md", "docs/speed.md", "docs/compilerkv.md", "docs/statistics.md"} <= set(PAGES)


def test_no_ratio_that_was_measured_is_left_out() -> None:
    kept = json.loads((figures.ROOT / "docs/measured/bench.json").read_text())["results"]
    page = (figures.ROOT / "docs/speed.md").read_text()
    assert [name for name in kept if f"| `{name}` |" not in page] == []


def test_what_is_no_figure_says_why() -> None:
    entries = Checkout.read().entries
    assert all(entry["why"] for entry in (*entries["constant"], *entries["kind"]))


def test_pages_that_agree_pass(checkout: Checkout) -> None:
    assert all(one.ok for one in shown(checkout))
    assert len(shown(checkout)) == 6
    assert uncovered(checkout) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [("52.4", "52.5"), ("1,234", "1,235"), ("| 3.3 |", "| 3.4 |"), ("`snapkv` 3.3;", "`snapkv` 3.30;"), ("0.5", "0.9")],
)
def test_a_figure_changed_by_hand_fails_and_is_mended(checkout: Checkout, before: str, after: str) -> None:
    page = checkout.root / "README.md"
    page.write_text(PAGE.replace(before, after))
    (drifted,) = (one for one in shown(checkout) if not one.ok)
    assert drifted.said == after.strip("|`snapkv ;")
    mend(checkout, [drifted])
    assert all(one.ok for one in shown(checkout))
    assert page.read_text() == PAGE.replace(before, after).replace(drifted.said, drifted.found)


@pytest.mark.parametrize("added", ["It is 1.9 x faster.", "- .3 of it", "| `h2o` | 7 |", "up to `x` 40 %"])
def test_a_number_without_a_source_is_told_with_its_line(checkout: Checkout, added: str) -> None:
    (checkout.root / "README.md").write_text(f"{PAGE}\n{added}\n")
    (found,) = uncovered(checkout)
    assert found.startswith(f"README.md:{len(PAGE.splitlines()) + 2}: ")
    assert added in found


@pytest.mark.parametrize("added", ["`x 1.9`", "```\nx 1.9\n```", "[x](https://a.b/1.9)", "1. one", "Qwen2.5, int4, v1"])
def test_code_links_and_names_are_no_figures(checkout: Checkout, added: str) -> None:
    (checkout.root / "README.md").write_text(f"{PAGE}\n{added}\n")
    assert uncovered(checkout) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("less than before", "less than ever", "0 times"),
        ("b.csv?method=compilerkv|snapkv&", "b.csv?method=compilerkv&", "has 3 numbers, its sources 2"),
        ("method=compilerkv#score", "budget=64#score", "picks 2 rows"),
        ("json?made", "json?lost", "no result 'lost'"),
        ("| method | 64 |", "| method | 128 |", "0 tables"),
    ],
)
def test_an_entry_that_names_nothing_is_refused(checkout: Checkout, before: str, after: str, told: str) -> None:
    table = checkout.root / "docs/figures.toml"
    table.write_text(TABLE.replace(before, after))
    with pytest.raises(FigureError, match=told):
        shown(Checkout.read(checkout.root))


def test_the_command_tells_page_source_and_verdict(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "ROOT", checkout.root)
    assert main([]) == 0
    assert capsys.readouterr().out.endswith("6 figures, 0 drifted, 0 numbers without a source\n")
    (checkout.root / "README.md").write_text(PAGE.replace("52.4", "52.5"))
    assert main([]) == 1
    assert "DRIFTED  README.md: says '52.5', its source '52.4' (b.csv?" in capsys.readouterr().out
    (checkout.root / "docs/figures.toml").write_text(TABLE.replace("x.json?made", "x.json?lost"))
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
