"""A method that lacks what is compiled for the model says so: before the run, in every record and on the board."""

from pathlib import Path

import pandas as pd
import pytest

from harness.cli import main
from harness.plan.methods import plan_method, told_uncompiled
from harness.records.record import LACKS
from methods.registry import load_methods, make_policy
from tests.tiny_run import only


def test_a_run_says_it_at_once_with_the_command_and_the_board_marks_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = "run --model tiny --methods compilerkv,headkv,compilerkv@paper,snapkv --tasks niah/passkey --lengths 600"
    assert main([*words.split(), "--limit", "1", "--budgets", "64", "--observe", "0", "--out", str(tmp_path)]) == 0
    lines = [line for line in caplog.messages if "UNCOMPILED" in line]
    assert [line.split(": ")[1] for line in lines] == ["compilerkv", "headkv", "compilerkv@paper"]
    assert all("`harness compile --model tiny --out DIR`, --set " in line for line in lines)
    rows = pd.read_csv(only(tmp_path) / "board.csv").set_index("method")
    assert {name for name, flags in rows["flags"].items() if "uncompiled" in flags.split()} == {
        "compilerkv",
        "headkv",
        "compilerkv@paper",
    }
    assert "c without what is compiled for this model" in " ".join(capsys.readouterr().out.split())


def test_methods_that_lack_the_same_share_a_line_and_others_have_none() -> None:
    planned = [plan_method(label, revision="0" * 40) for label in ("compilerkv", "compilerkv@window", "snapkv")]
    (line,) = told_uncompiled(planned, "org/name")
    assert line.startswith("UNCOMPILED: compilerkv, compilerkv@window: no tables for this model")
    assert told_uncompiled(planned[2:], "org/name") == []


@pytest.mark.parametrize("name", load_methods())
def test_what_is_lacking_is_worded_as_boards_know_it(name: str) -> None:
    policy = make_policy(name)
    assert not policy.lacks or policy.lacks.startswith(LACKS)
