"""Records as a table: one row each, flat columns, Parquet and back, and a card that the Hub's own reader takes."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

import leaderboards
from harness.cli import main
from harness.errors import HarnessError
from leaderboards.tables.frame import results_card, to_parquet
from tests.leaderboards.tables.test_speed import measured
from tests.submitted import manifest, record, records, stored

LOST = {"status": "oom", "prediction": "", "token_ids": (), "nll": None, "nll_first": None, "metrics": {}}


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


def test_one_row_a_record_with_what_the_record_and_its_run_say(tmp_path: Path) -> None:
    stored(tmp_path, manifest(machine={"processor": "a processor", "accelerators": ["a card", "a card"]}))
    frame = leaderboards.load(str(tmp_path))
    assert leaderboards.load(tmp_path).equals(frame)  # a second call too: no module took its place
    assert list(frame["score"]) == [r.metrics["score"] for r in records()]
    expected = {
        **{"method": "snapkv", "budget": "16", "kept_slots": 128, "kv_bytes": 16896, "revision": "r0"},
        **{"dtype": "float32", "machine": "a card, a card", "commit": "c0ffee", "meta.length": 1024},
        "protocol": "passkey",
    }
    assert {name: frame.iloc[1][name] for name in expected} == expected
    assert "meta.needles" not in frame  # a list
    assert not [name for name in frame if frame[name].map(lambda v: isinstance(v, (list, tuple, dict))).any()]


def test_columns_that_only_some_records_have(tmp_path: Path) -> None:
    timed = measured(peak_bytes=7)
    own = [record(0, "snapkv", "16", needle_tokens=4, needle_kept=((4, 2), (2, 0)), measured=timed)]
    own += [record(1, "snapkv", "16", notes=("one", "two"), meta={"length": "long", "needles": [""]})]
    own += [record(2, "snapkv", "16", **LOST)]
    stored(tmp_path, own=own)
    frame = leaderboards.load(tmp_path)
    assert frame["needle_percent"].iloc[0] == 50.0 and math.isnan(frame["needle_percent"].iloc[1])
    assert (frame["measured.tpot_s"].iloc[0], frame["measured.peak_bytes"].iloc[0]) == (timed.tpot_s.median, 7)
    assert frame["measured.tpot_s"].isna().tolist() == [False, True, True]
    assert frame["notes"].tolist() == ["", "one; two", ""]
    assert math.isnan(frame["score"].iloc[2])
    assert frame["meta.length"].tolist() == ["1024", "long", "1024"]  # of two kinds, so text


def test_parquet_gives_the_table_back_and_a_card_is_what_the_hub_reads(tmp_path: Path) -> None:
    stored(tmp_path / "results", own=[*records()[:-1], record(2, "h2o", "0.5", **LOST)])
    frame = leaderboards.load(tmp_path / "results")
    assert export(tmp_path / "results", "--parquet", tmp_path / "a.parquet") == 0
    back = pd.read_parquet(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)
    with pytest.raises(HarnessError, match="cannot write"):
        to_parquet(frame, tmp_path / "missing" / "a.parquet")

    card = results_card(frame)
    name, results = model_index_to_eval_results(card["model-index"])
    assert name == "tiny"
    assert eval_results_to_model_index(name, results) == card["model-index"]
    cells = {(r.metric_args["method"], r.metric_args["budget"]): r for r in results if r.metric_type == "score"}
    assert cells.keys() == {("fullkv", "full"), *((m, b) for m in ("snapkv", "h2o") for b in ("16", "0.5"))}
    for cell, result in cells.items():
        scores = [r.metrics["score"] for r in records() if (r.method, r.budget) == cell]
        scores = scores[:2] if cell == ("h2o", "0.5") else scores
        assert result.metric_value == pytest.approx(sum(scores) / len(scores))
        counts = [result.metric_args[key] for key in ("samples", "samples_without_score")]
        assert counts == [len(scores), 3 - len(scores)]
        assert (result.dataset_type, result.task_type) == ("niah/passkey", "text-generation")
    assert cells["snapkv", "16"].metric_name == "score, snapkv at 16"
    assert cells["snapkv", "16"].metric_args["kept_share"] == pytest.approx(0.16 * 132 / 128)


@pytest.mark.parametrize(("name", "read"), [("card.json", json.loads), ("card.yaml", yaml.safe_load)])
def test_a_card_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, read: Any) -> None:
    stored(tmp_path / "results")
    assert export(tmp_path / "results", "--card", tmp_path / name) == 0
    assert "10 results" in capsys.readouterr().out  # score and NLL of 5 cells
    card = read((tmp_path / name).read_text(encoding="utf-8"))
    assert card == results_card(leaderboards.load(tmp_path / "results"))
    other = manifest(limit=2)
    stored(tmp_path / "results", other, [r.model_copy(update={"run_id": other.run_id}) for r in records()])
    assert export(tmp_path / "results", "--card", tmp_path / name) == 2
    assert "hold the same cells" in capsys.readouterr().err  # a card counts no sample twice


def test_nothing_to_load_and_nothing_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HarnessError, match="no run in"):
        leaderboards.load(tmp_path)
    stored(tmp_path, own=[])
    with pytest.raises(HarnessError, match="no records in"):
        leaderboards.load(tmp_path)
    assert export(tmp_path) == 2 and "--parquet FILE or --card" in capsys.readouterr().err


def test_the_package_imports_no_pandas_by_itself() -> None:
    code = "import sys, leaderboards; assert 'pandas' not in sys.modules and callable(leaderboards.load)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
