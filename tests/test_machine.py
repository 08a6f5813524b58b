"""What a manifest calls a processor, and how many threads it is asked to compute on."""

import os
from pathlib import Path

import pytest
import torch

from harness import machine
from tests.hostile import tried


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 17)"),  # as hypervisors say
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763 64-Core Processor"),
        (None, "arm64"),
    ],
)
def test_a_hidden_processor_is_told_from_others_of_its_maker(
    name: str | None, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {} if name is None else {"model name": [name], "cpu family": ["25"], "model\t": ["17"]}
    monkeypatch.setattr(machine, "cpu_info", lambda field: told.get(field, []))
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm64")
    assert machine.machine()["processor"] == called


def container(top: Path, monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, str]) -> None:
    """A machine of 8 cores and the control groups of a process in `group`, as /proc tells of them."""
    for name, text in files.items():
        (top / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (top / "groups" / name).write_text(text)
    (top / "own").write_text(group)
    monkeypatch.setattr(machine, "CGROUPS", top / "groups")
    monkeypatch.setattr(machine, "OWN_CGROUPS", top / "own")
    monkeypatch.setattr(machine, "_affinity", lambda: 8)


V1 = {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}
QUOTAS = [
    ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
    ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),  # of a group above
    ("3:cpuset:/\n1:cpu,cpuacct:/\n", V1, 2),
    ("1:cpu:/docker/x\n", {"cpu/docker/x/cpu.cfs_quota_us": "400000", "cpu/docker/x/cpu.cfs_period_us": "100000"}, 4),
    ("1:cpu:/\n", {**V1, "cpu/cpu.cfs_quota_us": "-1\n"}, 8),
    ("0::/\n", {"cpu.max": ""}, 8),
    ("0::/\n", {"cpu.max": "1 0"}, 8),
    ("0::/\n", {"cpu.max": "many 100000"}, 8),
    ("nonsense\n", {}, 8),
]


@pytest.mark.parametrize(("group", "files", "cores"), QUOTAS)
def test_a_container_has_the_cores_of_its_quota(
    group: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container(tmp_path, monkeypatch, group, files)
    assert machine.usable_cores() == cores
    (tmp_path / "own").unlink()  # /proc is hidden
    assert 1 <= machine.usable_cores() <= 8


def test_threads_are_torchs_choice_within_the_container_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    container(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "250000 100000\n"})
    for asked in (None, 2, 8):
        machine.set_threads(asked)
    assert chosen == [3, 2, 8]


@pytest.mark.hostile
@pytest.mark.parametrize("threads", [0, -1, 5000, 10**5, 10**30, -(10**30), 2**31, 2**63, 10**5000], ids=range(9))
def test_more_threads_than_cores_are_refused(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert "this machine has" in tried("threads", lambda: machine.check_threads(threads))
    assert machine.check_threads(4) == 4
