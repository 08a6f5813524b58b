"""`harness boundary` on the tiny model with a pretend prober: what it finds, prints, writes and refuses."""

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest

from harness.cli.boundary import boundary_parser
from harness.errors import HarnessError
from harness.records.boundary_folder import load_boundaries
from harness.records.measured import ProbeResult, ProbeSpec
from harness.speed.memory_limit import Limit
from harness.speed.target import swap_note
from tests.pretend import measured
from tests.speed.test_boundary import Known
from tests.tiny_run import verb

Captured = pytest.CaptureFixture[str]
Command = Callable[..., int]


class Pretend(Known):
    """A prober for the command: a known model of bytes under a limit of 2000, the model's own 1000 among them."""

    started: ClassVar[list[dict[str, Any]]] = []
    dies: ClassVar[set[tuple[int, int]]] = set()

    def __init__(self, **named: Any) -> None:
        super().__init__(0.5)
        self.started.append(named)
        self.model_bytes, self.limit = 1000, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, timeout_s: float = 600.0) -> ProbeResult:
        self.asked.append((spec.tokens, spec.batch))
        self.limit = Limit("address space", 2000, "no cgroup of its own: Permission denied")
        if (spec.tokens, spec.batch) in self.dies:
            raise HarnessError("the probe server ended (-9)")
        fits = spec.tokens * spec.batch * (1 if spec.method == "fullkv" else 0.25) <= 1000
        return ProbeResult(status="ok", measured=measured(spec, peak_bytes=5)) if fits else ProbeResult(status="oom")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The command on the tiny model with `Pretend`; arguments as typed."""
    monkeypatch.setitem(sys.modules, "harness.speed.client", SimpleNamespace(Prober=Pretend))
    monkeypatch.setattr(Pretend, "started", [])
    monkeypatch.setattr(Pretend, "dies", set())
    base = ("--model", "tiny", "--dtype", "float32", "--device", "cpu", "--methods", "fullkv,snapkv")
    return partial(verb, boundary_parser, *base, "--memory-limit", "2000", "--out", tmp_path)


def test_the_command_finds_prints_and_writes(command: Command, tmp_path: Path, capsys: Captured) -> None:
    assert command("--context", "512", "--max-batch", "8", "--threads", "1") == 0
    told = capsys.readouterr()
    assert "note: limit by address space, no cgroup of its own: Permission denied" in told.err
    assert "harness: fullkv full: 1024 tokens x 1: oom in" in told.err
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for cells in map(str.split, told.out.splitlines()):  # the table is folded
        rows[tuple(cells[:2])] += cells[2:]
    assert rows["full", "fullkv"] == ["768", "0.0", "1024", "oom", "1", "0.0", "2", "oom"]
    assert rows["128", "snapkv"] == ["3840", "0.0", "4096", "oom", "7", "0.0", "8", "oom"]
    manifest, records = load_boundaries(tmp_path)
    assert (manifest.limit_kind, manifest.model_bytes, manifest.threads, len(records)) == ("address space", 1000, 1, 4)
    assert (tmp_path / "frontier.svg").is_file() and (tmp_path / "frontier.md").is_file()
    assert Pretend.started == [{"model": "tiny", "dtype": "float32", "device": "cpu", "threads": 1}]
    assert {record.model_revision for record in records} == {manifest.model.revision} != {""}
    assert max(tried.tokens for record in records for tried in record.probes) <= manifest.context == 4096
    assert all(tried.predicted_bytes for record in records for tried in record.probes if tried.status == "oom")
    assert "1024 tokens x 1: oom in" in told.err and "MiB were predicted" in told.err
    assert manifest.notes[0].startswith("limit by address space, no cgroup")


def test_a_search_of_batches_of_copies_says_so(command: Command, tmp_path: Path) -> None:
    assert command("--context", "512", "--max-batch", "8", "--distinct", "4") == 0
    assert load_boundaries(tmp_path)[0].distinct == 4
    assert "batches: 4 prompts prefilled and the others copies" in (tmp_path / "frontier.md").read_text()
    with pytest.raises(HarnessError, match="was searched with distinct 4, not None; choose another --out"):
        command("--context", "512", "--max-batch", "8")


def test_a_limit_under_which_no_probe_starts_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretend, "ask", lambda *_, **__: ProbeResult(status="oom", error="killed by SIGKILL"))
    with pytest.raises(HarnessError, match="no probe runs under 2000 bytes: killed by SIGKILL; raise --memory-limit"):
        command()
    assert not list(tmp_path.iterdir())


def test_a_machine_with_swap_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    for without in ("MemTotal: 9 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n", "MemTotal: 9 kB\n", "odd"):
        path.write_text(without)
        assert swap_note(path) == []
    path.write_text("MemTotal: 9 kB\nSwapTotal: 2097152 kB\nSwapFree: 2096128 kB\n")
    (note,) = swap_note(path)
    assert "2048 MiB of swap, 1 in use" in note and "may hide that memory ran out" in note and "\n" not in note
    assert swap_note(tmp_path / "nowhere") == []


def test_a_prober_that_goes_down_is_started_again(command: Command, tmp_path: Path, capsys: Captured) -> None:
    Pretend.dies.add((768, 1))
    assert command("--methods", "fullkv", "--context", "512", "--max-batch", "2") == 1
    context = load_boundaries(tmp_path)[1][0].found
    assert context is not None and (context.answer, context.next_size, context.next_status) == (512, 768, "failed")
    assert len(Pretend.started) == 2
    err = capsys.readouterr().err
    assert "the probe server ended (-9)" in err and "1 of 2 searches end at a probe that failed" in err


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--memory-limit 900", "--memory-limit of 900 bytes is not above the loaded model's own 1000; raise it"),
        ("--memory-limit much", "'much' is no size"),
        ("--methods snapvk", "unknown method 'snapvk'"),
        ("--device cuda:77", "device 'cuda:77' is not available here"),
        ("--budgets many", "many"),
        ("--budgets 600 --context 512", "budget 600 is not below the --context of 512 tokens"),
        ("--context 5000", "--context 5000 exceeds 4096"),
        ("--max-tokens 5000", "--max-tokens 5000 exceeds the model's context of 4096; lower it"),
        ("--methods compilerkv --set compilerkv.tables=smollm2-135m", "tables smollm2-135m are of"),
        ("--timeout 1e7", "--timeout 10000000.0 is too large"),
        ("--max-tokens 200", "a longest context of 200 is below 256"),
        ("--max-batch 0", "--max-batch 0 is too small"),
        ("--timeout 0.5", "--timeout 0.5 is too small"),
        ("--set snapkv.window", "has no value"),
        ("--model tinny", "unknown model 'tinny'"),
    ],
)
def test_bad_input_is_refused_in_one_line(command: Command, typed: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(HarnessError) as refused:
        command(*typed.split())
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
