"""SIGTERM and SIGHUP end a run as an interrupt does: its manifest says so, and the same command goes on."""

import os
import signal
from pathlib import Path

import pytest

from harness.records.run_folder import RunStore, load_run
from harness.stopping import Stopped, stopping
from tests.records import test_run_folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_is_told_to_end_closes_its_manifest(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    begun = test_run_folder.manifest()
    with pytest.raises(KeyboardInterrupt), stopping(), RunStore(tmp_path, begun) as store, store.ending():
        os.kill(os.getpid(), number)
    assert load_run(store.folder)[0].status == "interrupted" and signal.getsignal(number) is before


def test_what_others_make_of_it_is_still_that_signal() -> None:
    def as_ray_does() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Stopped, match="SIGTERM") as told, stopping():
        as_ray_does()
    assert told.value.exit_code == 143


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(), stopping():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Stopped, match="SIGTERM"), stopping():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
