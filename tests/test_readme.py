"""README.md and docs/ are true: their Python runs, their commands exist, what they claim of boards holds.

Their numbers are held by `tests/test_figures.py`.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from harness.cli import main
from harness.models.assets import asset_folder

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


def blocks(language: str) -> list[str]:
    """The pages' blocks of code in a language; "" is what a shell is given."""
    tokens = [token for text in PAGES.values() for token in MarkdownIt("commonmark").parse(text)]
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def board(name: str) -> pd.DataFrame:
    """A published board by (budget, method)."""
    return pd.read_csv(ROOT / f"leaderboards/published/{name}.csv").set_index(["budget", "method"]).sort_index()


def rows(page: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(board, method, text by budget) of the lines of a page's table of boards."""
    budgets: list[str] = []
    for line in PAGES[page].splitlines():
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        if first == "board":
            budgets = others[1:]
        elif budgets and re.fullmatch(r"`[\w-]+`", first):
            yield first.strip("`"), others[0].strip("`*"), dict(zip(budgets, others[1:], strict=True))


@pytest.mark.parametrize(
    ("page", "name", "best"),
    [
        ("README.md", "retrieval", None),
        ("README.md", "longbench-8k", None),
        ("README.md", "graded", None),
        ("methods.md", "baselines", None),
    ],
)
def test_no_method_is_left_out(page: str, name: str, best: int | None) -> None:
    """best: the table has that many of the board, the best at each of its budgets; None: all."""
    shown = {method for where, method, _ in rows(page) if where == name} - {"share of the bytes"}
    published = board(name).drop("full")
    for budget in published.index.unique("budget"):
        assert shown == set(published.loc[budget].score_points_mean.nlargest(best or len(published)).index)


def test_headkv_loses_less_than_compilerkv_where_variables_are_tracked() -> None:
    rivals = pd.read_csv(ROOT / "leaderboards/published/retrieval.rivals.csv")
    told = rivals[(rivals.family == "tracking") & (rivals.measure == "nll")]
    assert set(told.budget) == {64, 128, 256, 512} and set(told.rival) == {"headkv"}
    assert (told.gain < 0).all()


def test_the_pages_claim_no_rank_while_their_boards_have_none() -> None:
    ranked = {name for page in ("README.md", "methods.md") for name, *_ in rows(page) if not _unranked(name)}
    assert ranked == {"graded"}
    assert "**No board of a published protocol ranks anything yet.**" in PAGES["README.md"]
    assert "**nothing here is told apart.**" in PAGES["compilerkv.md"]


def test_the_ranks_that_the_readme_tells_are_those_of_graded() -> None:
    ranks = board("graded")[["rank_low", "rank_high"]]
    for budget in ("64", "128"):
        told = {name: tuple(ranks.loc[budget, name]) for name in ("compilerkv", "headkv")}
        assert told == {"compilerkv": (1, 1), "headkv": (2, 2)}
    first = ranks.loc["256"].query("rank_low == 1")
    assert set(first.index) == {"compilerkv", "headkv"} and (first.rank_high == 2).all()


def test_who_keeps_the_rules_at_the_head_of_a_prompt() -> None:
    less = board("instructions").score_points_vs_fullkv_high  # upper end of the difference from the full cache
    assert all(less[budget, name] < 0 for budget in ("64", "128", "256") for name in ("h2o", "streamingllm"))
    assert less["64", "snapkv"] < 0 < less["128", "snapkv"] and less["64", "compilerkv"] > 0


def _unranked(name: str) -> bool:
    published = board(name).reset_index()
    return bool(
        published.rank_nothing_why.notna().all() and published[["rank_low", "rank_nll_low"]].isna().all(axis=None)
    )


def commands() -> set[tuple[str, ...]]:
    """The harness's commands in the pages' blocks: the command, its verb where it has verbs, and its options."""
    found = set()
    for line in "".join(blocks("")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["harness"] and words[1] != "lm-eval":  # the options of lm-eval are its own
            verb = words[2:3] if words[1] in ("data", "tables") else []
            found.add((words[1], *verb, *(word.partition("=")[0] for word in words if word.startswith("--"))))
    return found


@pytest.mark.parametrize("words", sorted(commands()), ids=" ".join)
def test_a_command_of_the_pages_exists(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([word for word in words if not word.startswith("--")] + ["--help"])
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.model
@pytest.mark.skipif(not asset_folder("smollm2-135m").is_dir(), reason="run `harness fetch smollm2-135m`")
def test_the_python_of_the_pages_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks("python")
    exec(compile(snippet, "docs/python.md", "exec"), {})
    *said, kept, full = capsys.readouterr().out.split()
    assert "71432" in " ".join(said)
    assert 0 < int(kept) < int(full)
