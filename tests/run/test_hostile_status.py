"""What `harness status` may find in a folder: a snapshot, logs and a manifest of any content, clocks that jump."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UNSAFE
from harness.records.log_folder import now
from harness.records.run_folder import RunStore
from harness.run.progress import PROGRESS_FILE, Snapshot
from harness.run.status import log_tails, run_status
from tests.cli.test_status import SNAPSHOT
from tests.hostile import tried
from tests.records.test_hostile_folders import STANDS
from tests.records.test_run_folder import manifest, record

pytestmark = pytest.mark.hostile


def shown(folder: Path) -> str:
    lines = [*run_status(folder), *log_tails(folder, 3)]
    assert not any(UNSAFE.search(line) for line in lines)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunStore]:
    with RunStore(tmp_path_factory.mktemp("running"), manifest(started=now())) as store:
        yield store


NUMBERS = st.one_of(st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.none(), st.text(max_size=5))


@given(field=st.sampled_from(sorted(Snapshot.model_fields)), value=NUMBERS)
def test_any_number_in_a_snapshot(running: RunStore, field: str, value: Any) -> None:
    given = {"ok": value} if field == "cells" else value
    path = running.folder / PROGRESS_FILE
    fields = SNAPSHOT.model_dump() | {"at": 4e9} | {field: given}
    text = ",".join(f'"{name}":{_json(own)}' for name, own in fields.items())
    path.write_text("{" + text + "}", encoding="utf-8", errors="surrogatepass")
    tried("numbers of a snapshot", partial(shown, running.folder), may_pass=True)
    path.unlink()


def _json(value: Any) -> str:
    """Also what is no JSON, as other programs write it."""
    if isinstance(value, dict):
        return "{" + ",".join(f'"{name}":{_json(own)}' for name, own in value.items()) + "}"
    return (
        f'"{value}"' if isinstance(value, str) else "null" if value is None else repr(value).replace("inf", "Infinity")
    )


@pytest.mark.parametrize("stands", STANDS)
@pytest.mark.parametrize("name", [PROGRESS_FILE, "logs/worker-0.log"])
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, stands: str, name: str) -> None:
    with RunStore(tmp_path, manifest(started=now())) as store:
        path = store.folder / name
        path.parent.mkdir(exist_ok=True)
        STANDS[stands](path)
        tried("no file in a folder", partial(shown, store.folder), may_pass="circle" in stands)


CLOCKS = [
    "2999-01-01T00:00:00+00:00",
    "0001-01-01T00:00:00+23:59",
    "1969-12-31T00:00:00",
    "",
    "now",
    "9" * 500,
    "2026-13-45",
]


@pytest.mark.parametrize("started", CLOCKS)
@pytest.mark.parametrize("at", [0.0, 1.0, 1e11])
def test_a_clock_that_jumps_is_no_trouble(tmp_path: Path, started: str, at: float) -> None:
    with RunStore(tmp_path, manifest(started=started)) as store:
        (store.folder / PROGRESS_FILE).write_text(SNAPSHOT.model_copy(update={"at": at}).model_dump_json())
        tried("clocks that jump", partial(shown, store.folder), may_pass=True)
        store.finish("finished", finished="1999-01-01T00:00:00+00:00")
    assert "finished 1999" in shown(store.folder)


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;x\x07", "\r\n\r\n", "\u202e", "x" * 3000, "\ufeff\x00"])
def test_texts_of_others_are_shown_as_they_are(tmp_path: Path, text: str) -> None:
    with RunStore(tmp_path, manifest(started=now())) as store:
        store.append([record("a", status="failed", error=f"why {text}")])
        store.finish("failed", finished="now", error=text)
    (store.folder / "logs").mkdir()
    (store.folder / "logs" / "worker-0.log").write_bytes(text.encode() * 3 + b"\xff\xfe")
    (store.folder / "logs" / "worker-x.log").touch()
    tried("texts of others", partial(shown, store.folder), may_pass=True)
    assert "why" in shown(store.folder)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, Path.touch])
def test_a_lock_of_any_kind_holds_nobody_up(tmp_path: Path, make: Callable[[Path], object]) -> None:
    with RunStore(tmp_path, manifest(started=now())) as store:
        pass
    (store.folder / ".lock").unlink()
    make(store.folder / ".lock")
    tried("no file in a folder", partial(shown, store.folder), may_pass=True)
