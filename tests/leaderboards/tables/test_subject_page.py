"""The section on a subject's strongest rivals as it is written: page, terminal, CSV, and the command line."""

from pathlib import Path

import pandas as pd
import pytest

from harness.cli import main
from harness.records.run_folder import RunStore
from leaderboards.stats.aggregate import aggregate
from leaderboards.stats.subject import ALL, COLUMNS
from leaderboards.tables.board import to_csv, to_markdown, to_terminal, write_board
from leaderboards.tables.sections import sections
from tests.leaderboards.stats.test_subject import scored, small
from tests.pretend import manifest, only

FAST = "--model tiny --dtype float32 --device cpu --nll-tokens 8 --budgets 32 --tasks stdlib/next_line --lengths 512"
CONFIG = 'methods = ["fullkv", "streamingllm@paper", "snapkv@kvcf"]\n'

FILES = ["b.md", "b.csv", "b.tasks.csv", "b.summary.csv", "b.visible.csv", "b.closed.csv"]


def test_page_terminal_and_csv_have_the_section(tmp_path: Path) -> None:
    records = [r for m, n in (("mine", 1.0), ("other", 2.25), ("fullkv", 0.5)) for r in scored(m, "ruler/vt", [n] * 20)]
    table = only(records, subject="mine")
    nll, score = list(sections(table))[:2]
    assert nll == "mine against the strongest other method of each family: NLL, nats per token"
    (row, every) = sections(table)[nll].to_dict("records")
    assert row == {
        "budget": "64", "family": "tracking", "tasks": "1", "n": "20", "subject": "1.000", "rival": "other",
        "rival's": "2.250", "gain": "+1.250 [+1.250, +1.250]", "verdict": "better", "loss": "0.500",
        "rival's loss": "1.750", "loss ratio": "0.29",
    }  # fmt: skip
    assert every["family"] == ALL and "loss" not in sections(table)[score]
    pages = write_board([table], tmp_path, "b")
    assert [p.name for p in pages] == [*FILES, "b.rivals.csv"]
    page, text = pages[0].read_text(), to_terminal([table])
    assert f"### {nll}\n\n| budget " in page and "favours it" in page
    frame = pd.read_csv(pages[-1])
    assert list(frame)[-len(COLUMNS) :] == COLUMNS
    assert frame[frame.measure == "nll"].loss_ratio.tolist() == pytest.approx([0.5 / 1.75] * 2)
    assert f"{nll}\nbudget" in text and max(map(len, text.splitlines())) <= 120
    assert all(str(column) in text for column in sections(table)[nll])


def test_without_a_subject_nothing_changes(tmp_path: Path) -> None:
    plain, asked = aggregate(small()), aggregate(small(), subject="mine")
    pages = write_board(plain, tmp_path, "b")
    assert [p.name for p in pages] == FILES
    page = pages[0].read_text()
    assert "against" not in page
    parts = to_markdown(asked, title="b").split("\n### ")
    lines = "\n### ".join(part for part in parts if not part.startswith("mine against")).splitlines()
    kept = [line for line in lines if not line.startswith(("- against", "- gain", "- verd"))]
    assert "\n".join(kept) + "\n" == page
    assert to_csv(plain) == to_csv(asked)


def test_the_board_command_takes_a_subject(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = manifest().model_copy(update={"status": "started"})
    with RunStore(tmp_path / "runs", told) as store:
        store.append([r.model_copy(update={"run_id": told.run_id}) for r in small()])
        store.finish("finished", finished="2025-01-01")
    command = ["board", str(tmp_path / "runs"), "--out", str(tmp_path), "--name", "b"]
    assert main(command) == 0
    assert "strongest" not in capsys.readouterr().out and not (tmp_path / "b.rivals.csv").exists()
    assert main([*command, "--subject", "mine"]) == 0
    assert "mine against the strongest other method of each family: NLL" in capsys.readouterr().out
    assert "### mine against" in (tmp_path / "b.md").read_text()
    assert "far@p" in (tmp_path / "b.rivals.csv").read_text()
    assert main([*command, "--subject", "mien"]) == 2
    says = "no method 'mien' with a budget in these records; methods with one: far@p, mine, near"
    assert capsys.readouterr().err == f"harness: {says}\n"


def test_a_config_names_the_subject_without_changing_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, asked, out = tmp_path / "plain.toml", tmp_path / "asked.toml", tmp_path / "out"
    plain.write_text(CONFIG)
    asked.write_text(CONFIG + '[board]\nsubject = "streamingllm@paper"\n')

    def run(config: Path, *more: str, out: Path = out) -> tuple[str, str]:
        rest = ["--limit", "2", "--max-new-tokens", "4", "--out", str(out), *FAST.split()]
        assert main(["run", "--config", str(config), *rest, *more]) == 0
        return capsys.readouterr()

    run(plain)
    (folder,) = [path for path in out.iterdir() if path.is_dir()]
    assert not (folder / "board.rivals.csv").exists()
    before, spec = (folder / "records.jsonl").read_bytes(), (folder / "run.json").read_text().split('"spec"')[1]
    assert "0 of 2 samples to do" in run(asked)[1]
    assert (folder / "records.jsonl").read_bytes() == before and '"subject"' not in spec
    assert "### streamingllm@paper against" in (folder / "board.md").read_text()
    assert set(pd.read_csv(folder / "board.rivals.csv").rival) == {"snapkv@kvcf", "strongest of each"}
    changed = tmp_path / "changed"
    assert "against the strongest" in run(asked, "--set", "streamingllm.sinks=2", out=changed)[0]
    (board,) = changed.glob("*/board.rivals.csv")
    assert set(pd.read_csv(board).subject) == {"streamingllm@paper[sinks=2]"}
    assert "against the strongest" not in run(asked, "--methods", "fullkv,snapkv@kvcf")[0]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('[board]\nsubject = "snapvk"', "board.subject 'snapvk' is no method with a budget of this run: streamingllm"),
        ('[board]\nsubjct = "snapkv"', "option board.subjct"),
        ("[board]\nsubject = 5", "option board.subject"),
        ("board = 5", "option board:"),
        ('[board.frontiers]\nmine = ["snapvk"]', "board.frontiers 'mine': 'snapvk' is no method of this run: fullkv"),
        ("[board.frontiers]\nmine = 5", "option board.frontiers.mine"),
        ('subject = "snapkv@kvcf"', "option subject"),
    ],
)
def test_bad_board_tables_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, says: str
) -> None:
    path = tmp_path / "b.toml"
    path.write_text(f"{CONFIG}{table}\n")
    assert main(["run", "--config", str(path), "--out", str(tmp_path / "out"), *FAST.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "out").exists()
