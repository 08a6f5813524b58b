"""A run of conversations on the tiny model, from the command to an archive that verifies."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.models.assets import asset_folder
from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer
from harness.submission.archive import pack_run
from harness.submission.verify import verify_pack
from tests.submitted import forged
from tests.tiny_run import TINY, call, only

RUN = (
    *("run", *TINY, "--tasks", "turns/told,turns/again/told", "--methods", "fullkv,snapkv,compilerkv@paper"),
    *("--budgets", "64", "--lengths", "2048", "--limit", "2", "--observe", "0", "--nll-tokens", "4"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("awsdocs", "essays"):
        if not asset_folder(name).is_dir():
            pytest.skip(f"{name} is not in the cache; run `harness fetch {name}`")
    folder = tmp_path_factory.mktemp("turns")
    assert call(*RUN, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (only(root) / "records.jsonl").read_text().splitlines()]


def test_a_record_is_one_conversation_and_both_protocols_pair(lines: list[dict[str, Any]]) -> None:
    assert len(lines) == 2 * 2 * 3
    first, again = (
        {(line["sample_id"], line["method"]): line for line in lines if line["task"] == task}
        for task in ("turns/told", "turns/again/told")
    )
    assert first.keys() == again.keys()
    for key, line in first.items():
        other = again[key]
        assert (line["prompt_sha256"], line["answers"], line["meta"]) == (
            other["prompt_sha256"],
            other["answers"],
            other["meta"],
        )
        if key[1] == "compilerkv@paper":
            assert other["status"] == "skipped" and "cannot compress again" in other["error"]
            continue
        assert len(line["turn_tokens"]) == 5 == len(line["prediction"].split("\n"))
        assert {"score", *(f"turn{n}" for n in range(1, 6))} <= line["metrics"].keys()
        assert line["token_ids"][: line["turn_tokens"][0]] == other["token_ids"][: other["turn_tokens"][0]]
        assert (line["token_ids"] == other["token_ids"]) == (line["kv_bytes_end"] == other["kv_bytes_end"])
        assert line["kv_bytes_end"] >= other["kv_bytes_end"]


def other_order(line: dict[str, Any]) -> None:
    line["prediction"] = "\n".join(reversed(line["prediction"].split("\n")))


def shifted(line: dict[str, Any]) -> None:
    first, *others = line["turn_tokens"]
    line["turn_tokens"] = [first - 1, *others]


def more_turns(line: dict[str, Any]) -> None:
    line["prediction"] += "\nattic"


def test_a_run_of_conversations_verifies_and_a_changed_turn_does_not(
    root: Path, tmp_path: Path, tiny: LoadedModel
) -> None:
    decode = TaskTokenizer(tiny.tokenizer).decode
    pack = tmp_path / "turns.zip"
    for change, reason in (
        (None, ""),
        (other_order, "tokens: records.jsonl:1"),
        (more_turns, "tokens: records.jsonl:1"),
        (shifted, "records: records.jsonl:1: turns of"),
    ):
        run_id = pack_run(only(root), pack).run_id
        if change is not None:
            forged(pack, lambda lines, own=change: own(lines[0]), run_id=run_id)  # type: ignore[misc]
        reasons = verify_pack(pack, decode=decode).reasons
        assert any(told.startswith(reason) for told in reasons) if change else not reasons, reasons
