"""Long outputs from the command line: a run, its archive, and the board's section."""

from pathlib import Path

import pandas as pd

from harness.submission.verify import verify_pack
from tests.tiny_run import TINY, call, only, records

RUN = ("run", *TINY, "--methods", "fullkv,snapkv,streamingllm@paper", "--budgets", "64", "--tasks", "long/list")
SHORT = ("--lengths", "1024", "--limit", "6", "--max-new-tokens", "40", "--nll-tokens", "8", "--observe", "0")


def test_a_run_of_long_answers_is_verified_and_has_its_section(tmp_path: Path) -> None:
    assert call(*RUN, *SHORT, "--out", tmp_path / "results") == 0
    for record in records(tmp_path / "results"):
        assert record["metrics"].keys() == {"score", "right", "ended"}
        assert record["byte_steps"] >= len(record["token_ids"]) * record["stored_bytes"] * 0.9
        if record["method"] == "streamingllm@paper":
            assert record["byte_steps"] == len(record["token_ids"]) * record["stored_bytes_end"]
    assert call("submit", only(tmp_path / "results"), "--out", tmp_path) == 0
    (pack,) = tmp_path.glob("*.zip")
    assert not [check for check in verify_pack(pack).checks if check.refused]
    assert call("board", tmp_path / "results", "--html", "--out", tmp_path / "board") == 0
    assert "### Long outputs" in (tmp_path / "board" / "board.md").read_text()
    assert "Long outputs" in (tmp_path / "board" / "board.html").read_text()
    rows = pd.read_csv(tmp_path / "board" / "board.lengths.csv").set_index("method")
    assert (rows.inflation_mean > 0).all() and rows.loc["fullkv", "cost_mean"] == 1
    assert (rows.drop("fullkv").cost_mean < 1).all() and (rows.n == 6).all()
