"""README.md and docs/ are true: their Python runs, their commands exist, their tables say what published boards say."""

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
LOSSES = {"longbench-8k"}
"""Boards of which the pages show what is lost in NLL; of the others they show scores."""


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


def score(cell: pd.Series) -> str:
    """As the pages show a score: half of its interval, the places it may have, bold where only the first is left."""
    half = (cell.score_points_high - cell.score_points_low) / 2
    shown = f"{cell.score_points_mean:.1f} ± {half:.1f}"
    if pd.isna(cell.rank_low):
        return shown
    low, high = int(cell.rank_low), int(cell.rank_high)
    return (f"**{shown}**" if high == 1 else shown) + f" ({low if low == high else f'{low}-{high}'})"


def loss(cell: pd.Series) -> str:
    """As the pages show nats lost against the full cache."""
    mean, low, high = (cell[f"nll_nats_vs_fullkv_{part}"] for part in ("mean", "low", "high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


@pytest.mark.parametrize("page", ["README.md", "methods.md"])
def test_a_table_says_what_its_boards_say(page: str) -> None:
    shown = list(rows(page))
    assert shown
    for name, method, cells in shown:
        published = board(name)
        for budget, text in cells.items():
            if budget not in published.index.get_level_values("budget"):
                assert text == "", (name, method, budget)
            elif method == "share of the bytes":
                assert text == f"{published.loc[budget].kv_percent_of_full.max():.1f} %", (name, budget)
            else:
                cell = published.loc[budget, method]
                assert text == (loss(cell) if name in LOSSES else score(cell)), (name, method, budget)


@pytest.mark.parametrize(
    ("page", "name", "best"),
    [
        ("README.md", "retrieval", None),
        ("README.md", "longbench-8k", None),
        ("README.md", "baselines", 5),
        ("methods.md", "baselines", None),
    ],
)
def test_no_method_is_left_out(page: str, name: str, best: int | None) -> None:
    """best: the table has that many of the board, the best at each of its budgets; None: all."""
    shown = {method for where, method, _ in rows(page) if where == name} - {"share of the bytes"}
    published = board(name).drop("full")
    for budget in published.index.unique("budget"):
        assert shown == set(published.loc[budget].score_points_mean.nlargest(best or len(published)).index)


def test_the_boards_of_the_readme_are_described_as_they_are() -> None:
    described = re.findall(r"^- \[`(\S+)`\]\(\S+\): (\d+) prompts of (\d+) (.*?)\.$", PAGES["README.md"], re.M | re.S)
    assert [name for name, *_ in described] == list(dict.fromkeys(name for name, *_ in rows("README.md")))
    for name, prompts, tasks, rest in described:
        full = board(name).loc["full", "fullkv"]
        per_task = pd.read_csv(ROOT / f"leaderboards/published/{name}.tasks.csv")
        assert (int(prompts), int(tasks)) == (full.score_points_n, per_task.task.nunique())
        if name not in LOSSES:
            said = re.search(r"The full cache: (.*)", rest)
            assert said is not None
            assert said[1] == score(full)


def test_headkv_loses_less_than_compilerkv_where_variables_are_tracked() -> None:
    rivals = pd.read_csv(ROOT / "leaderboards/published/retrieval.rivals.csv")
    told = rivals[(rivals.family == "tracking") & (rivals.measure == "nll")]
    assert set(told.budget) == {64, 128, 256, 512} and set(told.rival) == {"headkv"}
    assert (told.gain < 0).all()


def test_the_pages_claim_no_rank_while_their_boards_have_none() -> None:
    ranked = {name for page in ("README.md", "methods.md") for name, *_ in rows(page) if not _unranked(name)}
    assert ("**No board here ranks anything.**" in PAGES["README.md"]) == (not ranked)
    assert ("**nothing here is told apart.**" in PAGES["compilerkv.md"]) == (not ranked)


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
