"""SIGTERM and SIGHUP end a run as an interrupt does: its manifest says so, and the same command goes on."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from harness.records.run_folder import RunStore, load_run
from harness.run.sequential import SampleRunner
from harness.stopping import Stopped, stopping
from tests.records import test_run_folder
from tests.tiny_run import RUN, call, manifest, only, records


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_is_told_to_end_closes_its_manifest(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    begun = test_run_folder.manifest()
    with pytest.raises(KeyboardInterrupt), stopping(), RunStore(tmp_path, begun) as store, store.ending():
        os.kill(os.getpid(), number)
    assert load_run(store.folder)[0].status == "interrupted" and signal.getsignal(number) is before


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_that_is_told_to_end_goes_on_when_its_command_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = SampleRunner.records, list[int]()

    def told(self: SampleRunner, group: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, group, **options)

    monkeypatch.setattr(SampleRunner, "records", told)
    assert call(*RUN, "--out", tmp_path) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("harness: interrupted by SIGTERM; ") and "repeat the command to go on" in line
    assert manifest(tmp_path)["status"] == "interrupted" and len(records(tmp_path)) > 0
    assert call(*RUN, "--out", tmp_path) == 0 and manifest(tmp_path)["status"] == "finished"
    assert not list(only(tmp_path).glob("*.part"))


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(), stopping():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Stopped, match="SIGTERM"), stopping():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
