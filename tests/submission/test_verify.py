"""Verifying a submission: what is true passes, and every kind of tampering is caught although the checksums fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.boards.sources import load_pack
from harness.cli.submit import submit_parser
from harness.cli.verify import verify_parser
from harness.errors import HarnessError
from harness.submission.archive import MANIFEST, RECORDS, pack_run
from harness.submission.verify import verify_pack
from tasks import load_tasks
from tests.submitted import METHODS, forged, manifest, members_of, record, records, repacked, stored
from tests.tiny_run import verb

Lines = list[dict[str, Any]]


def test_a_true_run_passes_and_every_record_is_looked_at(pack: Path) -> None:
    verdict = verify_pack(pack)
    assert verdict.ok and verdict.reasons == []
    every = dict.fromkeys(("records", "complete", "budgets", "scores", "likelihood"), 15)
    assert {check.name: check.counted for check in verdict.checks} == {"archive": 2, "manifest": 1, **every}
    assert {r.metrics["score"] for r in records()} == {0.0, 1.0}


BYTES = ("asked_bytes", "kv_bytes", "kv_bytes_end", "stored_bytes", "stored_bytes_end")


def changed(at: int, **fields: Any) -> Callable[[Lines], None]:
    return lambda lines: lines[at].update(fields)


def lost_sample(lines: Lines) -> None:
    lines[:] = [line for line in lines if "depth1" not in line["sample_id"]]


def right_by_its_own_answer(lines: Lines) -> None:
    """Another reference for one cell, which its prediction does contain."""
    wrong = next(line for line in lines if line["metrics"]["score"] == 0.0)
    wrong.update(answers=["tell"], metrics={"score": 1.0})


FORGERIES: dict[str, tuple[Callable[[Lines], None], str, str]] = {
    "an edited prediction": (changed(5, prediction="the key is 7777"), "scores", "score is 0 for"),
    "a changed score": (changed(1, metrics={"score": 0.5}), "scores", "the record says 0.5"),
    "a slightly changed score": (changed(1, metrics={"score": 2e-9}), "scores", "score is"),
    "another metric": (changed(1, metrics={"score": 0.0, "extra": 1.0}), "scores", "metrics"),
    "another reference": (right_by_its_own_answer, "records", "references"),
    "a missing sample": (lost_sample, "complete", "2 samples"),
    "a missing cell": (lambda lines: lines.__delitem__(3), "complete", "lacks 1 cells: h2o 16"),
    "a cell twice": (lambda lines: lines.append(lines[3]), "records", "is there twice"),
    "fewer bytes": (changed(1, kv_bytes=9000), "budgets", "do not fit into 9000 bytes"),
    "more bytes": (changed(1, kv_bytes=17100, stored_bytes=17100), "budgets", "over_budget is not set"),
    "fewer bytes stored": (changed(1, stored_bytes=16800), "budgets", "less than live"),
    "fewer stored at the end": (changed(1, stored_bytes_end=16800), "budgets", "less than live"),
    "uncounted positions": (changed(1, kv_bytes=16384), "budgets", "do not fit into 16384 bytes"),
    "fewer slots asked": (changed(1, budget_tokens=8), "budgets", "is 16 slots, not 8"),
    "more bytes asked for": (changed(1, asked_bytes=20000), "budgets", "asked for"),
    "a huge number": (changed(1, kv_bytes=10**400, over_budget=True), "records", "kv_bytes"),
    "another run": (changed(2, run_id="0" * 12), "records", "run_id"),
    "another model": (changed(2, model="huge"), "records", "model"),
    "an unknown cell": (changed(2, method="mine"), "records", "cell"),
    "no number": (changed(2, nll=float("nan")), "records", "nll"),
    "a negative NLL": (changed(2, nll=-1.0, nll_first=-2.0), "records", "nll"),
    "NLL over too many tokens": (changed(0, nll_tokens=65), "likelihood", "the spec allows 64"),
    "a first NLL above all": (changed(2, nll=0.5), "likelihood", "first token"),
    "no number of milliseconds": (changed(2, observe_ms=float("inf")), "records", "observe_ms"),
    "a field of its own": (changed(2, note="x"), "records", "note"),
    "another schema": (changed(2, schema_version=1), "records", "schema_version 1"),
    "a score without a run": (changed(2, status="oom"), "scores", "status oom"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_tampering_is_caught(pack: Path, name: str) -> None:
    change, check, reason = FORGERIES[name]
    verdict = verify_pack(forged(pack, change))
    assert any(told.startswith(f"{check}: ") and reason in told for told in verdict.reasons), verdict.reasons


def test_what_observing_costs_goes_with_a_run(tmp_path: Path) -> None:
    own = [r.model_copy(update={"observe_ms": -1.5}) if r.method == "h2o" else r for r in records()]
    pack_run(stored(tmp_path / "results", own=own), tmp_path / "pack.zip")
    assert verify_pack(tmp_path / "pack.zip").ok
    _, found = load_pack(tmp_path / "pack.zip")
    assert [r.observe_ms for r in found] == [r.observe_ms for r in own]
    assert {r.observe_ms for r in found} == {None, -1.5}


def test_bytes_raised_in_every_record_of_a_budget_are_caught_by_the_other_budget(pack: Path) -> None:
    def raise_all(lines: Lines) -> None:
        for line in lines:
            if line["budget"] == "16":
                line.update({name: 2 * line[name] for name in BYTES})

    assert any("bytes a slot" in reason for reason in verify_pack(forged(pack, raise_all)).reasons)


def test_a_run_from_before_stored_bytes_is_checked_without_positions(tmp_path: Path) -> None:
    own = [r.model_copy(update={"stored_bytes": 0, "stored_bytes_end": 0}) for r in records()]
    plain = {"kv_bytes": 16 * 1024, "asked_bytes": 16 * 1024}
    half = {"kv_bytes": 50 * 1024, "asked_bytes": 50 * 1024}
    sizes = {"full": {}, "16": plain, "0.5": half}
    old = [r.model_copy(update=sizes[r.budget]) for r in own]
    for run, ok in ((old, True), (own, False)):
        pack_run(stored(tmp_path / f"results {ok}", own=run), tmp_path / "pack.zip")
        assert verify_pack(tmp_path / "pack.zip").ok == ok


def test_a_sample_cannot_be_dropped_by_changing_the_manifest_too(pack: Path) -> None:
    members = members_of(forged(pack, lost_sample))
    members[MANIFEST] = manifest(samples=2).model_dump_json().encode()
    assert any("2 samples of niah/passkey" in reason for reason in verify_pack(repacked(pack, members)).reasons)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (manifest(seed=43), "run_id"),
        (manifest().model_copy(update={"run_id": manifest(seed=43).run_id}), "hash of the spec"),
        (manifest(cells=4), "methods and budgets make 5"),
        (manifest().model_copy(update={"spec": manifest(methods=METHODS[:2]).spec}), "hash of the spec"),
    ],
)
def test_a_manifest_of_another_run_is_caught(pack: Path, other: Any, reason: str) -> None:
    members = members_of(pack) | {MANIFEST: other.model_dump_json().encode()}
    verdict = verify_pack(repacked(pack, members, run_id=other.run_id))
    assert any(reason in told for told in verdict.reasons), verdict.reasons


def test_a_kept_manifest_of_another_run_is_caught(pack: Path) -> None:
    members = members_of(pack) | {"run.1.json": manifest(seed=43).model_dump_json().encode()}
    assert "hash of the spec" in verify_pack(repacked(pack, members)).reasons[0]


def test_a_score_that_needs_what_no_record_holds_is_refused(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_tasks()["niah/passkey"]
    monkeypatch.setattr(type(task), "score", lambda self, sample, prediction: {"score": float(sample.question == "")})
    assert "cannot be recomputed" in verify_pack(pack).reasons[0]


@pytest.mark.parametrize("line", [b'{"a":' * 100_000, b"{}", b'{"schema_version": 2', b"[1]"])
def test_damaged_records_are_refused_in_one_line(pack: Path, line: bytes) -> None:
    members = members_of(pack)
    members[RECORDS] += line + b"\n"
    (reason,) = verify_pack(repacked(pack, members)).reasons
    assert reason.startswith("records: records.jsonl:16 is damaged") and "\n" not in reason


def test_an_edit_that_leaves_the_score_alone_needs_the_checksum_or_the_tokenizer(pack: Path) -> None:
    """Both are wrong, so the score says nothing of which one the model gave."""
    told = {r.token_ids: r.prediction for r in records()}
    members = members_of(forged(pack, changed(0, prediction="the key is 7777", token_ids=[9])))
    told[9,] = "I cannot tell"
    verdict = verify_pack(repacked(pack, members), decode=lambda ids: told[tuple(ids)])
    assert any("tokens: records.jsonl:1" in reason for reason in verdict.reasons)
    assert verify_pack(pack).ok


def test_tokens_are_checked_with_a_tokenizer(pack: Path) -> None:
    verdict = verify_pack(pack, decode=lambda ids: "the key is 7001 and more")
    tokens = verdict.checks[-1]
    assert (tokens.name, tokens.counted) == ("tokens", 15)
    assert tokens.refused == sum(r.prediction != "the key is 7001" for r in records())


def test_a_partial_run_is_packed_and_passed_only_when_asked_for(tmp_path: Path) -> None:
    folder, out = stored(tmp_path, manifest(status="interrupted"), records()[:7]), tmp_path / "pack.zip"
    with pytest.raises(HarnessError, match="interrupted with 7 of 15 cells"):
        pack_run(folder, out)
    pack_run(folder, out, partial=True)
    assert not verify_pack(out).ok
    assert verify_pack(out, partial=True).ok


def test_a_lost_cell_is_told_and_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"status": "oom", "prediction": "", "token_ids": (), "nll": None, "nll_first": None, "nll_tokens": 0}
    own = [*records()[:-1], record(2, "h2o", "0.5", **lost, metrics={})]
    pack_run(stored(tmp_path / "results", own=own), tmp_path / "pack.zip")
    assert verb(verify_parser, tmp_path / "pack.zip") == 0
    assert "without a score: 1 oom" in capsys.readouterr().out


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "results")
    out = tmp_path / "pack.zip"
    assert verb(submit_parser, tmp_path / "results", "--out", out) == 0
    assert verb(verify_parser, out) == 0
    told = capsys.readouterr().out
    assert "prompts and references are as reported" in told and "\nOK: the scores follow" in told
    assert verb(verify_parser, forged(out, changed(5, prediction="\x1b[2J"))) == 1
    told = capsys.readouterr().out
    assert "REFUSED\n  scores: records.jsonl:6 (" in told and "\x1b" not in told


@pytest.mark.parametrize("text", ["\x1b[31m\n", "\u202e", "a" * 5000])
def test_what_a_reason_quotes_is_escaped_and_short(pack: Path, text: str) -> None:
    fakes = [verify_pack(forged(pack, changed(0, **{name: text}))) for name in ("sample_id", "method", "task")]
    members = members_of(pack)
    fakes += [verify_pack(repacked(pack, members, run_id=text[:900]))]
    members[MANIFEST] = manifest(budgets=("16", text[:900])).model_dump_json().encode()
    fakes += [verify_pack(repacked(pack, members, run_id=manifest(budgets=("16", text[:900])).run_id))]
    for verdict in fakes:
        assert verdict.reasons
        assert all(reason.isascii() and reason.isprintable() and len(reason) <= 1000 for reason in verdict.reasons)
