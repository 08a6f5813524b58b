"""What the command line prints to: outputs that hold few letters or are full; and what it imports for a word."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.cli.terminal import fit_streams
from tests.hostile import TALLY, tried_command
from tests.tiny_run import call

pytestmark = pytest.mark.hostile

LETTERS = "Δ ± × → ≤ ≥ – — … é ß 漢 \ud800 \U0001f600 ½"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "utf-8", "utf-16", "cp437"])
def test_every_letter_can_be_printed_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    fit_streams()
    print(LETTERS, flush=True)
    told = held.getvalue().decode(encoding)
    assert "e" in told or "é" in told
    if encoding == "latin-1":
        assert told.startswith("D ± × -> <= >= - - ... é ß")
    TALLY["encodings", "taken"] += 1


@pytest.mark.usefixtures("_no_pictures")
def test_a_board_is_written_where_its_signs_cannot_be_printed(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    assert call("board", results) == 0
    assert (results / "board.md").is_file() and b"D" in held.getvalue() and b"\\u" not in held.getvalue()


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_output_ends_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["list", "boards"]) == 2
    assert (
        capsys.readouterr().err == "harness: the output: No space left on device; make room or choose another place\n"
    )


def test_a_place_that_the_system_refuses_ends_in_a_line(results: Path, tmp_path: Path) -> None:
    locked = tmp_path / "file"
    locked.touch()
    for words in (("export", results, "--card", locked / "x.json"), ("submit", results, "--out", locked / "x.zip"),
                  ("compare", results, results, "--csv", locked / "x.csv"), ("board", results, "--out", locked / "x"),
                  ("new-method", "my_own", "--to", locked), ("tables", "show", "/dev/null/x"), ("fetch", "/dev/null"),
                  ("verify", locked / "x"), ("status", locked / "x"), ("simulate", locked)):  # fmt: skip
        tried_command("refused places", *words)


WORDS = (
    "list methods",
    "list tasks",
    "run --methods nope --tasks niah",
    "run --methods snapkv@nope --tasks niah",
    "run --methods kvpress:nope --tasks niah",
    "run --methods snapkv --tasks nope",
    "run --methods snapkv --tasks niah --budgets nope",
    "run --methods snapkv --tasks niah --model nope",
    "run --methods snapkv --tasks niah --set snapkv.nope=1",
    "run --methods snapkv --tasks niah --threads 100000",
    "bench --methods nope",
    "boundary --methods nope --memory-limit 1GiB",
    "boundary --methods fullkv --memory-limit 1e999",
    "serve-bench --methods fullkv --batch 0",
    "compile --corpus nope --out x",
    "tune nope --out x",
    "calibrate-tasks --tasks nope --out x",
    "calibrate-relay --receiver nope --out x",
    "run --methods snapkv --tasks niah --receiver tiny",
    "run --methods snapkv --tasks relay --receiver nope",
    "new-method snapkv",
    "nightly nope",
    "nightly nightly --threads 0",
)
LOOK = """
import contextlib, io, sys
from harness.cli import main
for line in sys.argv[1:]:
    code = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    assert code == (0 if line.startswith("list") else 2), (line, code, told.getvalue())
    assert "torch" not in sys.modules, line
"""


def test_what_is_named_wrongly_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    checkout = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": checkout}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *WORDS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    TALLY["words before torch", "refused"] += len(WORDS) - 2
