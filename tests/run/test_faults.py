"""Short fault campaigns; `make faults` runs the long ones."""

from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests import faults, faults_alone

pytestmark = pytest.mark.xdist_group("ray")


SMALL = ("--tasks", "stdlib/next_line", "--contexts", "protocol", "--lengths", "512", "--limit", "3", "--budgets", "32")


def test_nothing_is_lost_when_workers_nodes_and_drivers_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [("worker", 0.02), ("node", 0.05), ("driver", 0.1)]  # early: a run is short, and records come in batches
    monkeypatch.setattr(faults.Trial, "draw", classmethod(lambda cls, seed: cls(seed, kinds.copy())))
    trials = faults.campaign([0], tmp_path)
    assert [trial.struck for trial in trials] == [["worker", "node", "driver"]]
    assert [trial.line() for trial in trials if trial.wrong] == []


@pytest.mark.usefixtures("_no_pictures")
def test_nothing_is_lost_when_a_run_is_killed_told_to_end_and_out_of_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [("disk", 0.3), ("term", 0.5), ("kill", 0.6)]
    monkeypatch.setattr(faults_alone, "RUN", (*faults_alone.RUN, *SMALL))
    monkeypatch.setattr(faults_alone.Trial, "draw", classmethod(lambda cls, seed: cls(seed, kinds)))
    (trial,) = faults_alone.campaign([0], tmp_path)
    assert (trial.struck, trial.wrong) == (["disk", "term", "kill"], []), trial.line()
