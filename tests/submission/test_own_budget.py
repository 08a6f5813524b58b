"""Verifying a run with a method of its own budget: what it kept, and what others were given for it, are recomputed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.records.record import Record, RunManifest
from harness.records.spec import MethodSpec
from harness.submission.archive import pack_run
from harness.submission.verify import verify_pack
from tests.submitted import HEADS, LAYERS, SLOT, forged, manifest, record, stored

KEPT, BUDGET = (37, 41, 30, 42), 19  # of 2 heads in 4 layers: 18.75 slots of a head on average
HELD, ASKED = sum(KEPT) * (SLOT + 4), BUDGET * HEADS * LAYERS * (SLOT + 4)
GVOTE = MethodSpec(label="gvote", name="gvote", budgeted=False, own=True)
PLAIN = (MethodSpec(label="fullkv", name="fullkv", budgeted=False), GVOTE, MethodSpec(label="snapkv", name="snapkv"))


def run(**changes: Any) -> RunManifest:
    return manifest(**{"methods": PLAIN, "budgets": ("16", "=gvote"), "cells": 4, **changes})


def of_bytes(base: Record, method: str, budget: str, size: int, **changes: Any) -> Record:
    sizes = {"kv_bytes": size, "kv_bytes_end": size + 1024, "stored_bytes": size, "stored_bytes_end": size + 4096}
    return base.model_copy(update={"method": method, "budget": budget, "asked_bytes": size, **sizes, **changes})


def lines(*, without: str = "") -> list[Record]:
    found = []
    for number in range(3):
        plain = record(number, "snapkv", "16")
        own = of_bytes(plain, "gvote", "own", HELD, budget_tokens=None, kept_slots=KEPT)
        given = of_bytes(plain, "snapkv", "=gvote", ASKED, budget_tokens=BUDGET, kept_slots=(BUDGET * HEADS,) * LAYERS)
        found += [record(number, "fullkv", "full"), own, plain, given]
    return [r.model_copy(update={"run_id": run().run_id}) for r in found if r.method != without]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    pack_run(stored(tmp_path / "results", run(), lines()), tmp_path / "pack.zip")
    return tmp_path / "pack.zip"


def test_a_true_run_passes(pack: Path) -> None:
    verdict = verify_pack(pack)
    assert verdict.ok and verdict.reasons == [] and verdict.lines == 12


def changed(at: int, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda found: found[at].update(fields)


def fewer(found: list[dict[str, Any]]) -> None:
    """What others were given for half of its slots, true to itself."""
    half, size = BUDGET // 2, BUDGET // 2 * HEADS * LAYERS * (SLOT + 4)
    same = dict.fromkeys(("kv_bytes", "stored_bytes", "asked_bytes"), size)
    found[3].update(same, budget_tokens=half, kept_slots=[half * HEADS] * LAYERS)


FORGERIES: dict[str, tuple[Callable[[list[dict[str, Any]]], None], str]] = {
    "a method said to store less": (changed(1, asked_bytes=HELD - 132), "a method of its own budget stores 19800"),
    "fewer bytes than its slots take": (
        changed(1, kv_bytes=HELD - 1320, stored_bytes=HELD - 1320, asked_bytes=HELD - 1320),
        "150 kept slots of 128.0 bytes do not fit into 18480 bytes",
    ),
    "a budget of its own": (changed(1, budget_tokens=19), "budget own of 100 tokens is None slots, not 19"),
    "less for others": (fewer, "9504 bytes asked for, gvote stores 19800"),
    "no budget for others": (changed(3, budget_tokens=None), "None slots of 100 tokens are no budget that gvote found"),
    "a whole prompt for others": (changed(3, budget_tokens=100), "100 slots of 100 tokens are no budget that gvote"),
    "bytes of more slots for others": (
        changed(3, **dict.fromkeys(("kv_bytes", "stored_bytes", "asked_bytes"), ASKED + 1056)),
        "bytes asked for make",
    ),
    "a slot more for others": (
        changed(3, budget_tokens=20, asked_bytes=ASKED + 1056, kept_slots=[40] * 4),
        "21120 bytes asked for, gvote stores 19800",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_tampering_is_caught(pack: Path, name: str) -> None:
    change, reason = FORGERIES[name]
    verdict = verify_pack(forged(pack, change, run_id=run().run_id))
    assert not verdict.ok and any(reason in told for told in verdict.reasons), verdict.reasons


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"budgets": ("16", "=h2o")}, "budget '=h2o' is what no method of this run keeps"),
        ({"methods": (PLAIN[0], GVOTE.model_copy(update={"own": False}), PLAIN[2])}, "kind whole, here it is own"),
        (
            {"methods": (*PLAIN[:2], PLAIN[2].model_copy(update={"budgeted": False, "own": True}))},
            "here it is budgeted",
        ),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    other = run(**changes)
    pack_run(stored(tmp_path / "results", other, []), tmp_path / "pack.zip", partial=True)
    verdict = verify_pack(tmp_path / "pack.zip")
    assert any(reason in told for told in verdict.reasons), verdict.reasons


def test_a_part_of_a_run_need_not_hold_what_the_others_budget_is_held_to(tmp_path: Path) -> None:
    """Without its own cell a part of a run is sound: there is nothing that the others' budget could be held to."""
    pack_run(stored(tmp_path / "results", run(), lines(without="gvote")), tmp_path / "pack.zip", partial=True)
    assert verify_pack(tmp_path / "pack.zip", partial=True).ok
    assert not verify_pack(tmp_path / "pack.zip").ok


def test_run_ids_from_before_such_methods_are_as_they_were() -> None:
    assert "own" not in manifest().spec.model_dump_json() and manifest().run_id == "cd67f823c9a0"
    assert '"own":true' in run().spec.model_dump_json()
    assert MethodSpec.model_validate_json(GVOTE.model_dump_json()) == GVOTE
    with pytest.raises(ValueError, match="said to be given a budget and to find its own"):
        MethodSpec(label="gvote", name="gvote", own=True)
