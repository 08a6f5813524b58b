"""What observing costs: which prompts it is measured on, in which order, and what comes of it when something fails."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.engine.engine import Engine
from harness.records.record import Record, RunManifest
from harness.records.run_folder import load_run
from harness.run.observing import observe_ms, observed
from methods.base import Needs
from tests.tiny_run import FAST, call, only

pytestmark = pytest.mark.usefixtures("_no_pictures")
PLAIN, WINDOW, SUMS = Needs(), Needs(window=32), Needs(window=1, column_sums=True)
LABELS = "fullkv,streamingllm@paper,snapkv@kvcf,h2o@paper,h2o@kvpress"  # the last two differ while decoding alone
RUN = ("run", *FAST, "--methods", LABELS)
CELLS = 9


class Prefills:
    """In the place of an engine: prefills take what they are said to take."""

    def __init__(self, seconds: Mapping[Needs, float | BaseException]) -> None:
        self.seconds, self.asked = seconds, list[Needs]()

    def prefill(self, ids: Sequence[int], needs: Needs) -> Any:
        self.asked.append(needs)
        took = self.seconds[needs]
        if isinstance(took, BaseException):
            raise took
        return SimpleNamespace(clock=SimpleNamespace(seconds={"prefill": took}.__getitem__))


def found(engine: Prefills, *needs: Needs, turn: int = 0) -> dict[Needs, float]:
    ours: Any = engine
    return observe_ms(ours, [1, 2, 3], needs, turn=turn)


def test_every_needs_is_prefilled_once_and_the_order_turns_round() -> None:
    engine = Prefills({PLAIN: 1.0, WINDOW: 0.75, SUMS: 1.5})
    costs = {PLAIN: 0.0, WINDOW: -250.0, SUMS: 500.0}
    assert found(engine, SUMS, PLAIN, WINDOW, SUMS, WINDOW) == costs
    assert engine.asked == [PLAIN, SUMS, WINDOW]
    assert found(engine, SUMS, WINDOW, turn=3) == costs
    assert engine.asked[3:] == [WINDOW, SUMS, PLAIN]


def test_nothing_observed_is_nothing_prefilled() -> None:
    engine = Prefills({})
    assert found(engine, PLAIN, PLAIN) == {PLAIN: 0.0} and engine.asked == []


def test_what_fails_to_be_measured_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="harness"):
        assert found(Prefills({PLAIN: 1.0, WINDOW: MemoryError(), SUMS: 2.0}), WINDOW, SUMS) == {PLAIN: 0.0, SUMS: 1e3}
        assert found(Prefills({PLAIN: RuntimeError("no\nroom"), WINDOW: 2.0}), WINDOW) == {PLAIN: 0.0}
    assert [line.partition("costs was ")[2] for line in caplog.messages] == [
        "not measured on 3 tokens: MemoryError",
        "not measured on 3 tokens: no room",
    ]


def group(task: str, length: int, *ids: str) -> Any:
    """Samples of one context, as far as they matter here."""
    return [
        SimpleNamespace(task=SimpleNamespace(name=task), sample=SimpleNamespace(id=one, meta={"length": length}))
        for one in ids
    ]


def test_the_first_contexts_of_each_length_and_data_set_are_measured() -> None:
    plan = [group("niah", 64 * (1 + i % 2), f"n{i}") for i in range(8)]
    plan += [group("ruler/vt", 64, "v0")]  # its length has enough
    plan += [group("rows", 3000 + i, f"r{i}a", f"r{i}b") for i in range(3)]  # lengths that nobody asked for
    turns = observed(plan, lengths=(64, 128), count=2)
    assert {name for _, name in turns} == {"n0", "n1", "n2", "n3", "r0a", "r0b", "r1a", "r1b"}
    for task, first, second in (("niah", "n0", "n2"), ("niah", "n1", "n3"), ("rows", "r0a", "r1a")):
        assert (turns[task, first] + turns[task, second]) % 2 == 1
    assert turns["rows", "r0a"] == turns["rows", "r0b"]
    ones = observed(plan, lengths=(64, 128), count=1)
    assert list(ones.values()) == [0, 1, 2, 2]
    assert observed(plan, lengths=(64, 128), count=0) == {}


def load(root: Path) -> tuple[RunManifest, list[Record]]:
    return load_run(only(root))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Needs]]:
    """Tokens and needs of every prefill of an engine."""
    calls, real = list[tuple[int, Needs]](), Engine.prefill

    def prefill(engine: Engine, ids: Sequence[int], needs: Needs) -> Any:
        calls.append((len(ids), needs))
        return real(engine, ids, needs)

    monkeypatch.setattr(Engine, "prefill", prefill)
    return calls


def test_a_run_says_what_observing_costs_and_is_the_same_run(asked: list[tuple[int, Needs]], tmp_path: Path) -> None:
    assert call(*RUN, "--out", tmp_path / "off") == 0
    assert len(asked) == 3  # one a sample, for all cells
    assert call(*RUN, "--observe", "2", "--out", tmp_path / "on") == 0
    (plain, off), (manifest, on) = load(tmp_path / "off"), load(tmp_path / "on")
    assert manifest.run_id == plain.run_id and manifest.spec == plain.spec
    assert [r.token_ids for r in on] == [r.token_ids for r in off] and len(on) == 3 * CELLS
    assert all(r.observe_ms is None for r in off)
    samples = list(dict.fromkeys(r.sample_id for r in on))
    for sample in samples[:2]:
        own = [r for r in on if r.sample_id == sample]
        costs = {r.method: {x.observe_ms for x in own if x.method == r.method} for r in own}
        assert costs["fullkv"] == costs["streamingllm@paper"] == {0.0}
        assert costs["h2o@paper"] == costs["h2o@kvpress"] != costs["snapkv@kvcf"]
        assert all(len(values) == 1 and None not in values for values in costs.values())
    assert all(r.observe_ms is None for r in on if r.sample_id == samples[2])
    alone = [needs for _, needs in asked[3:]]
    assert len(alone) == 3 + 2 * 3 and alone[1] == alone[7] == PLAIN and alone[1:4] == alone[5:8][::-1]
    assert not any(needs.decode_attention for needs in alone[1:4])
    texts = {name: (only(tmp_path / name) / "board.md").read_text() for name in ("off", "on")}
    assert "observe ms" in texts["on"] and "observe ms" not in texts["off"]


def test_a_run_that_goes_on_measures_the_same_samples(tmp_path: Path) -> None:
    assert call(*RUN, "--observe", "2", "--out", tmp_path) == 0
    path = only(tmp_path) / "records.jsonl"
    _, whole = load(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: CELLS + 4]))
    assert call(*RUN, "--observe", "2", "--out", tmp_path) == 0
    _, again = load(tmp_path)
    assert [(r.key, r.observe_ms is None) for r in again] == [(r.key, r.observe_ms is None) for r in whole]
    assert [r.observe_ms for r in again[: CELLS + 4]] == [r.observe_ms for r in whole[: CELLS + 4]]


def test_a_measurement_that_fails_costs_no_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, calls = Engine.prefill, list[Needs]()

    def prefill(engine: Engine, ids: Sequence[int], needs: Needs) -> Any:
        calls.append(needs)
        if len(calls) % 4 != 1:  # the shared one is the first of four
            raise RuntimeError("can't allocate memory")
        return real(engine, ids, needs)

    monkeypatch.setattr(Engine, "prefill", prefill)
    assert call(*RUN, "--limit", "2", "--observe", "2", "--out", tmp_path) == 0
    _, records = load(tmp_path)
    assert len(calls) == 8 and {r.status for r in records} == {"ok"}
    free = {"fullkv", "streamingllm@paper"}
    assert {r.method: r.observe_ms for r in records} == {m: 0.0 if m in free else None for m in LABELS.split(",")}


def test_a_prompt_that_fails_is_not_prefilled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = list[Needs]()

    def prefill(engine: Engine, ids: Sequence[int], needs: Needs) -> Any:
        calls.append(needs)
        raise RuntimeError("broken")

    monkeypatch.setattr(Engine, "prefill", prefill)
    assert call(*RUN, "--limit", "2", "--observe", "2", "--out", tmp_path) == 1
    _, records = load(tmp_path)
    assert len(calls) == 2 and {(r.status, r.observe_ms) for r in records} == {("failed", None)}


def test_questions_over_one_context_share_one_measurement(asked: list[tuple[int, Needs]], tmp_path: Path) -> None:
    run = ("run", *FAST, "--methods", "fullkv,h2o", "--budgets", "32", "--query", "agnostic")
    run = (*run, "--tasks", "multiquery/niah", "--lengths", "1024", "--limit", "6")
    assert call(*run, "--observe", "1", "--out", tmp_path) == 0
    _, records = load(tmp_path)
    costs: dict[str, set[float | None]] = {}
    for record in records:
        if record.method == "h2o":
            costs.setdefault(record.sample_id.rsplit("/", 1)[0], set()).add(record.observe_ms)
    first, *others = costs.values()
    assert len(first) == 1 and None not in first and others and all(own == {None} for own in others)
    assert len(asked) == len(costs) + 2
    (tokens,) = {r.compressed_tokens for r in records if r.observe_ms is not None}
    assert {own for own, _ in asked[:3]} == {tokens}
