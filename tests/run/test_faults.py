"""A short fault campaign; `make faults` runs the long one."""

from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.faults import Trial, campaign

pytestmark = pytest.mark.xdist_group("ray")


def test_nothing_is_lost_when_workers_nodes_and_drivers_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [("worker", 0.02), ("node", 0.05), ("driver", 0.1)]  # early: a run is short, and records come in batches
    monkeypatch.setattr(Trial, "draw", classmethod(lambda cls, seed: cls(seed, faults.copy())))
    trials = campaign([0], tmp_path)
    assert [trial.struck for trial in trials] == [["worker", "node", "driver"]]
    assert [trial.line() for trial in trials if trial.wrong] == []
