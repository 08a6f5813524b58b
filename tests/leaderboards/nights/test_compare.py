"""Nights compared with nights: what is flagged, what is not, and what is never compared."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from harness.records.record import Record, RunManifest
from leaderboards.nights.compare import NightComparison, NightlyOptions, compare
from leaderboards.nights.files import Night, night_of
from leaderboards.stats.paired import ALL, EVERY
from tests.pretend import manifest, record

CELLS = (("fullkv", "full"), ("snapkv", "64"), ("h2o", "64"))
TASKS = ("niah/kamradt", "ruler/vt")
OPTIONS = NightlyOptions(version=1, baseline="published", score_points=5)
BARE = NightlyOptions(version=1, baseline="published", score_points=0, nll_nats=0, bytes_percent=0)
Edit = Callable[[Record], Mapping[str, Any]]


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def records(*, n: int = 8, tasks: Sequence[str] = TASKS, edit: Edit = lambda r: {}) -> list[Record]:
    """Three cells on every task; scores and NLLs that differ by sample, changed by `edit`."""
    times = {"prefill_s": 0.5, "decode_s": 3.0, "decode_rows": 3}
    made = []
    for (method, budget), task, i in itertools.product(CELLS, tasks, range(n)):
        own = {"task": task, "nll": 1.0 + i / 7, "prompt_sha256": sha(task, i), **times}
        made.append(record(method, budget, str(i), (1 + i % 3) / 4, **own))
    return [r.model_copy(update=dict(edit(r))) for r in made]


def told(*, torch: str = "2.13.0+cpu", finished: str = "2026-01-02T03:10:00+00:00", **changes: Any) -> RunManifest:
    machine = {"processor": "Xeon", "cores": 2, "accelerators": [], **changes.pop("machine", {})}
    update = {"machine": machine, "versions": {"torch": torch}, "finished": finished, "git_commit": "c0ffee"}
    return manifest(**changes).model_copy(update={**update, "started": "2026-01-02T03:00:00+00:00"})


def night(stored: Sequence[Record], *, version: int = 1, machine_id: str = "m1", **changes: Any) -> Night:
    return night_of(stored, told(**changes), board="nightly", version=version, machine_id=machine_id)


def against(edit: Edit, *, options: NightlyOptions = OPTIONS, **size: Any) -> NightComparison:
    """A night changed by `edit` against the same one unchanged."""
    return compare(night(records(**size)), night(records(**size, edit=edit)), options)


def scored(r: Record, by: float) -> dict[str, Any]:
    return {"metrics": {"score": r.metrics["score"] + by}}


def longer(r: Record, by: float) -> dict[str, Any]:
    assert r.nll is not None
    return {"nll": r.nll + by}


def named(changes: Sequence[Any]) -> set[tuple[str, str, str]]:
    return {(c.method, c.task, c.measure) for c in changes}


def noisy(seed: int, *, n: int = 8) -> list[Record]:
    generator = np.random.default_rng(seed)

    def edit(r: Record) -> dict[str, Any]:
        return scored(r, generator.choice([-0.25, 0, 0.25])) | longer(r, generator.normal(0, 0.3))

    return records(edit=edit, n=n)


def test_equal_nights_differ_by_exactly_nothing() -> None:
    found = against(lambda r: {}, options=BARE)
    assert found.regressions == found.counted == 0
    assert found.improved == found.retired == ()
    assert (found.cells, len(found.changes)) == (len(CELLS) * len(TASKS), (len(CELLS) + 1) * (len(TASKS) + 1) * 2)
    assert {(*c.change[:3], c.worse, c.corrected_worse, c.moved) for c in found.changes} == {(0, 0, 0, 1, 1, 0)}


def test_a_method_that_got_worse_is_caught_and_no_other() -> None:
    found = against(lambda r: scored(r, -0.25) | longer(r, 0.2) if r.method == "snapkv" else {})
    which = {(name, t, measure) for name in ("snapkv", EVERY[1]) for t in (*TASKS, ALL) for measure in ("score", "nll")}
    assert named(found.regressed) == which
    assert found.improved == found.facts == ()
    assert found.counted == 12
    whole, one = (next(c for c in found.regressed if (c.task, c.measure) == (t, "score")) for t in (ALL, TASKS[0]))
    assert (whole.change.mean, whole.change.high, whole.change.n) == (-25, -25, 16)
    assert whole.before - whole.now == pytest.approx(25)
    assert (whole.worse, whole.corrected_worse) == (2.0**-16, 12 * 2.0**-16)
    assert (one.worse, one.corrected_worse) == (2.0**-8, 8 * 2.0**-8)


def test_a_significant_change_below_the_floor_is_none() -> None:
    found, bare = (
        against(lambda r: scored(r, -0.04) | longer(r, 0.04), n=20, options=options) for options in (OPTIONS, BARE)
    )
    assert found.regressions == 0
    assert max(c.corrected_worse for c in found.changes) < 0.01
    assert len(bare.regressed) == len(found.changes)


def test_noise_raises_no_more_alarms_than_alpha() -> None:
    flagged = [compare(night(noisy(2 * i)), night(noisy(2 * i + 1)), BARE).regressions > 0 for i in range(60)]
    assert sum(flagged) <= 8  # at most 3 are expected; more than 8 would have a chance below 0.003


def test_samples_of_one_context_flip_together() -> None:
    def edit(r: Record) -> dict[str, Any]:
        return {"meta": {"group": "a" if int(r.sample_id) < 4 else "b"}, **longer(r, 0.5)}

    found = [c for c in against(edit).changes if c.measure == "nll"]
    assert {(c.moved, c.worse) for c in found} == {(2, 2.0**-2), (4, 2.0**-4)}


@pytest.mark.parametrize("status", ["failed", "oom", "skipped"])
def test_what_was_ok_and_has_no_score_is_flagged(status: str) -> None:
    def edit(r: Record) -> dict[str, Any]:
        lost = (r.method, r.task) == ("h2o", "ruler/vt") and r.sample_id in "12"
        return {"status": status, "metrics": {}, "nll": None} if lost else {}

    found = against(edit)
    assert found.facts == (f"h2o at 64, ruler/vt: were ok: 2 {status}",)
    assert found.regressions == 1
    broken = night(records(edit=edit))
    assert compare(broken, broken, OPTIONS).regressions == 0
    assert compare(broken, night(records()), OPTIONS).regressions == 0


@pytest.mark.parametrize(("grown", "flagged"), [(0, False), (1, False), (2, True), (-9, False)])
def test_kept_bytes_may_grow_by_the_floor(grown: int, flagged: bool) -> None:
    def edit(r: Record) -> dict[str, Any]:
        mine = (r.method, r.task, r.sample_id) == ("snapkv", TASKS[0], "0")
        return {"kv_bytes": r.kv_bytes + grown} if mine else {}

    facts = against(edit, options=OPTIONS.model_copy(update={"bytes_percent": 0.2})).facts  # 1.6 of 8 x 100 bytes
    assert [f.partition(": kept bytes")[0] for f in facts] == (["snapkv at 64, niah/kamradt"] if flagged else [])


def test_a_task_that_falls_to_0_fails_where_it_was_clearly_above() -> None:
    """Of 8 scores, 25 to 75, all are 0 now; `ruler/vt` had 25 once and 0 else, which is not clear."""

    def zero(r: Record) -> dict[str, Any]:
        return {"metrics": {"score": 0.0}} if r.method == "snapkv" else {}

    def low(r: Record) -> dict[str, Any]:
        return {"metrics": {"score": 0.25 * (r.sample_id == "3")}} if r.task == "ruler/vt" else {}

    before = night([r.model_copy(update=low(r)) for r in records()])
    found = compare(before, night([r.model_copy(update=zero(r)) for r in records()]), OPTIONS)
    assert found.fallen == ("snapkv at 64, niah/kamradt: fell to 0 from 46.9, n 8",)
    assert found.facts == found.fallen and found.regressions == 1 + len(found.regressed)
    assert compare(night(records()), night(records(edit=lambda r: scored(r, -0.2))), OPTIONS).fallen == ()
    assert against(zero, n=1).fallen == ()  # of one prompt nobody knows the noise


def test_a_small_loss_of_every_method_shows_in_their_mean() -> None:
    def edit(r: Record) -> dict[str, Any]:
        return scored(r, -0.2) if int(r.sample_id) % 3 == CELLS.index((r.method, r.budget)) else {}

    found = against(edit, n=9)
    assert (EVERY[1], ALL, "score") in named(found.regressed)
    (every,) = (c for c in found.regressed if (c.method, c.task) == (EVERY[1], ALL))
    assert (every.budget, every.moved, every.change.n) == (EVERY[0], 18, 18)
    assert every.change.mean == pytest.approx(-20 / 3) and every.worse == 2.0**-18
    cells = [c for c in found.changes if c.method != EVERY[1] and c.task != ALL and c.measure == "score"]
    assert {(c.moved, c.corrected_worse) for c in cells} == {(3, 1.0)}


def test_changed_prompts_retire_their_task() -> None:
    def edit(r: Record) -> dict[str, Any]:
        changed = {"prompt_sha256": sha("new")} if r.sample_id == "3" else {}
        return longer(r, 9) | changed if r.task == "ruler/vt" else {}

    found = against(edit)
    assert found.retired == ("ruler/vt: 1 of 8 prompts changed",)
    assert found.regressions == 0
    assert {c.task for c in found.changes} == {"niah/kamradt"}
    unknown = against(lambda r: {"prompt_sha256": ""})
    assert unknown.retired == ("niah/kamradt: 8 of 8 prompts changed", "ruler/vt: 8 of 8 prompts changed")


def test_what_only_one_night_has_is_named_and_not_compared() -> None:
    old = [r for r in records(tasks=("a/x", "b/y")) if r.method != "h2o"]
    new = [r for r in records(tasks=("b/y", "c/z"), n=6) if r.method != "snapkv"]
    found = compare(night(old), night(new), OPTIONS)
    lines = ("a/x: not run tonight", "c/z: new tonight", "h2o at 64: new tonight", "snapkv at 64: not run tonight")
    assert found.retired == lines
    assert {(c.method, c.task, c.change.n) for c in found.changes} == {
        ("fullkv", "b/y", 6)
    }  # one cell, so no mean of them
    nothing = compare(night(records(tasks=("a/x",))), night(records(tasks=("b/y",))), OPTIONS)
    assert (nothing.changes, nothing.regressions, nothing.cells) == ((), 0, 0)


@pytest.mark.parametrize(("other", "floor", "flagged"), [("m1", 10, 2), ("m2", 10, 0), ("m1", None, 0), ("m1", 60, 0)])
def test_seconds_are_judged_on_the_very_machine_above_a_floor(other: str, floor: float | None, flagged: int) -> None:
    slow = night(records(edit=lambda r: {"prefill_s": 0.75, "decode_s": 4.5}))
    options = OPTIONS.model_copy(update={"speed_percent": floor})
    found = compare(night(records(), machine_id=other), slow, options)
    assert [fact.split(": ")[1] for fact in found.facts] == ["prefill +50.0 %", "decode +50.0 %"][:flagged]
    clusters = [night(records(), machine_id=""), night(records(edit=lambda r: {"decode_s": 9.0}), machine_id="")]
    assert compare(*clusters, OPTIONS.model_copy(update={"speed_percent": 1.0})).facts == ()


@pytest.mark.parametrize("seed", range(5))
def test_worse_one_way_is_better_the_other(seed: int) -> None:
    a, b = night(noisy(seed)), night(noisy(seed + 1))
    there, back = compare(a, b, BARE), compare(b, a, BARE)
    for one, other in zip(there.changes, back.changes, strict=True):
        assert (one.worse, one.corrected_worse) == (other.better, other.corrected_better)
        assert one.change.mean == pytest.approx(-other.change.mean)
    assert named(there.regressed) == named(back.improved)
