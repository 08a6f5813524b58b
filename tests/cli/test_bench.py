"""`harness bench` and `harness serve-bench` with a pretend prober: options, tables, exit codes."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli.bench import bench_parser
from harness.cli.serve_bench import serve_bench_parser
from harness.errors import HarnessError
from harness.records.bench_folder import BENCHES
from harness.records.measured import ProbeResult, ProbeSpec
from tests.speed.test_bench import FakeProber, fine
from tests.tiny_run import verb

Captured = pytest.CaptureFixture[str]
Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The verbs with a pretend prober."""
    module = types.ModuleType("harness.speed.client")
    monkeypatch.setitem(sys.modules, "harness.speed.client", module)

    def call(name: str, *words: str, prober: FakeProber | None = None) -> int:
        module.Prober = prober or FakeProber()  # type: ignore[attr-defined]
        parser_of = {"bench": bench_parser, "serve-bench": serve_bench_parser}[name]
        shared = ("--model", "tiny", "--dtype", "float32", "--device", "cpu", "--threads", "1", "--out", tmp_path)
        return verb(parser_of, *shared, *words)

    return call


def test_bench_prints_and_writes_its_table(command: Command, tmp_path: Path, capsys: Captured) -> None:
    prober = FakeProber()
    words = ("--methods", "fullkv,snapkv", "--budgets", "16", "--lengths", "64", "--rounds", "1")
    assert command("bench", *words, "--set", "snapkv.kernel=5", prober=prober) == 0
    assert prober.asked[1].set == {"kernel": 5}
    printed = capsys.readouterr()
    assert "TPOT ms" in printed.out and "snapkv[kernel=5]" in printed.out
    (folder,) = BENCHES.find(tmp_path)
    assert (folder / "bench.md").is_file() and (folder / "bench.csv").is_file()


def test_serve_bench_asks_for_one_batch(command: Command, capsys: Captured) -> None:
    def answer(spec: ProbeSpec) -> ProbeResult:
        return fine(spec) if spec.method != "fullkv" else ProbeResult(status="oom", error="above the limit")

    prober = FakeProber(answer)
    words = ("--methods", "fullkv,snapkv", "--length", "640", "--memory-limit", "4GiB", "--no-warm-up")
    assert command("serve-bench", *words, prober=prober) == 0
    assert [(spec.tokens, spec.batch, spec.budget) for spec in prober.asked] == [(640, 16, None), (640, 16, "128")]
    assert {limit for limit, _ in prober.limits} == {4 * 2**30} and not prober.asked[0].warm_up
    out = capsys.readouterr().out
    assert "with prefill" in out and ": oom: " in out and "above the limit" in out


def test_lost_probes_end_with_one(command: Command, capsys: Captured) -> None:
    prober = FakeProber(lambda spec: ProbeResult(status="timeout", error="more than 1 s"))
    assert command("bench", "--methods", "snapkv", "--lengths", "640", "--budgets", "16", prober=prober) == 1
    assert "1 of 1 probes failed or ran out of time" in capsys.readouterr().err


BAD = ("--batch 0", "--rounds 0", "--new-tokens 1", "--chunk 0", "--threads 0", "--timeout 0")
OTHER = [("--memory-limit much", "'much' is no size"), ("--set snapkv.kernel", "has no value")]


@pytest.mark.parametrize(("words", "message"), [*((words, f"{words}(.0)? is ") for words in BAD), *OTHER])
def test_options_out_of_range_are_named(command: Command, words: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        command("bench", "--methods", "snapkv", *words.split())
