"""One record never kills a board: it is refused by file and line, or the board comes out whole."""

import json
from pathlib import Path

import pytest

from harness.boards.sources import collect
from harness.cli import main
from harness.records.log_folder import to_line
from harness.submission.archive import RECORDS, pack_run
from tests.hostile import tried
from tests.submitted import members_of, records, repacked, stored

pytestmark = pytest.mark.hostile

DEEP = "[" * 100_000 + "]" * 100_000
FIELDS = {
    **{f"kv_bytes {v[:9]}": ("kv_bytes", v) for v in ("-1", "1" + "0" * 400, str(2**63), "1.5", "true", "null", '"7"')},
    **{f"prefill_s {v}": ("prefill_s", v) for v in ("Infinity", "-Infinity", "NaN", "1e999", "-1", "1e300", '"x"')},
    **{f"metrics {v}": ("metrics", f'{{"score":{v}}}') for v in ("1e307", "NaN", "-1", "1e999", '"x"', "null", "[]")},
    **{f"nll {v}": ("nll", v) for v in ("NaN", "Infinity", "1e999", "-5", "1e300")},
    **{f"method {v[:9]}": ("method", v) for v in ('"\\ud800"', "5", "null", "[]", f'"{"x" * 5000}"')},
    **{f"meta {v[:9]}": ("meta", v) for v in (f'{{"a":{DEEP}}}', DEEP, '{"group":"\\udfff"}', "5", '{"a":1e999}')},
    **{f"{name} deep": (name, DEEP) for name in ("answers", "notes", "token_ids", "needle_kept", "measured")},
}


def line_with(name: str, value: str) -> bytes:
    """A record whose field has that JSON text."""
    told = json.loads(to_line(records()[0]))
    rest = json.dumps({key: own for key, own in told.items() if key != name})
    return f"{rest[:-1]}, {json.dumps(name)}: {value}}}\n".encode()


@pytest.mark.parametrize(("name", "value"), FIELDS.values(), ids=list(FIELDS))
def test_a_record_out_of_range_is_refused_by_file_and_line(name: str, value: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "results")
    pack_run(folder, tmp_path / "pack.zip")
    path, lines = folder / RECORDS, (folder / RECORDS).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([line_with(name, value), *lines[1:]]))
    for whole in (True, False):
        assert f"{RECORDS}:1" in tried("records of boards", lambda whole=whole: collect([folder], whole=whole))
    pack = repacked(tmp_path / "pack.zip", {**members_of(tmp_path / "pack.zip"), RECORDS: path.read_bytes()})
    assert f"{RECORDS}:1" in tried("records of archives", lambda: collect([pack]))


def test_the_board_command_ends_in_that_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored(tmp_path / "results")
    with (folder / RECORDS).open("ab") as log:
        log.write(line_with("meta", f'{{"a":{DEEP}}}'))
    assert main(["board", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{RECORDS}:16" in line
