"""`harness lm-eval` and `harness lm-eval-import`: lm-eval's own command line with our model, then our board."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.cli.lm_eval import lm_eval_parser
from harness.cli.lm_eval_import import lm_eval_import_parser
from harness.errors import HarnessError
from harness.lm_eval.command_line import register, run_lm_eval, tokenizer_of
from harness.lm_eval.import_results import import_results
from harness.models.tiny import tiny_tokenizer
from harness.records.run_folder import load_run
from leaderboards.stats.aggregate import aggregate
from tests.hostile import tried_command

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions of the example under snapkv, by the command line."""
    where = tmp_path_factory.mktemp("results")
    task, text = where / "kv_choices.yaml", (EXAMPLE / "kv_choices.yaml").read_text(encoding="utf-8")
    task.write_text(text.replace("examples/lm_eval", str(EXAMPLE)), encoding="utf-8")
    model = "pretrained=tiny,dtype=float32,method=snapkv,budget=64,recent=8"
    flags = ["--tasks", str(task), "--limit", "4", "--output_path", str(where / "out"), "--log_samples"]
    before = list(sys.argv)
    assert run_lm_eval(["--model", "kvpolicy", "--model_args", model, *flags]) == 0 and sys.argv == before
    return where / "out"


def test_the_results_carry_what_was_measured(results: Path) -> None:
    config = _stored(results)["config"]
    assert (config["kv_method"]["label"], config["kv_budget"]) == ("snapkv[recent=8]", "64")
    assert (config["kv_kept_tokens"], config["kv_prefills"], config["device"]) == (64, 4, "auto")
    assert 0 < config["kv_bytes"] < config["kv_full_bytes"]


def test_imported_records_make_a_board(results: Path, tmp_path: Path) -> None:
    folders = list(import_results(results, root=tmp_path, command=("harness", "lm-eval-import")))
    assert [count for _, count in folders] == [4]
    manifest, records = load_run(folders[0][0])
    samples = [json.loads(line) for line in next(results.rglob("samples_*.jsonl")).read_text().splitlines()]
    assert [r.metrics["score"] for r in records] == [line["acc"] for line in samples]
    facts = _stored(results)["config"]["kv_prompts"][samples[0]["prompt_hash"]]
    assert (records[0].kv_bytes, list(records[0].kept_slots)) == (facts["kv_bytes"], facts["kept_slots"])
    assert records[0].kept_slots == (128,) * 4  # 64 a head
    assert {record.memory for record in records} == {"physical"}
    assert (records[0].task, records[0].method, records[0].nll) == ("lm-eval/kv_choices", "snapkv[recent=8]", None)
    assert records[0].prediction in samples[0]["doc"]["choices"]
    assert records[0].answers == (samples[0]["doc"]["choices"][samples[0]["doc"]["label"]],)
    (table,) = aggregate(records, manifests=[manifest])
    assert table.rows["score_points_mean"].iloc[0] == pytest.approx(100 * sum(line["acc"] for line in samples) / 4)
    assert list(import_results(results, root=tmp_path, command=("harness", "lm-eval-import"))) == folders
    assert len(load_run(folders[0][0])[1]) == 4


def _uncompressed(stored: dict[str, Any]) -> None:
    for facts in stored["config"]["kv_prompts"].values():
        facts["compressed"] = False


def _older(stored: dict[str, Any]) -> None:
    for facts in stored["config"]["kv_prompts"].values():
        for name in ("stored_bytes", "stored_bytes_end"):
            del facts[name]


@pytest.mark.parametrize(
    ("change", "marked"),
    [
        (lambda stored: stored["config"].update(kv_memory="simulated"), lambda r: r.memory == "simulated"),
        (
            lambda stored: stored["config"].update(kv_prompts={}, use_cache="x.db"),
            lambda r: (r.status, r.kv_bytes) == ("skipped", 0),
        ),
        (_older, lambda r: r.status == "ok" and r.stored_bytes == 0 < r.kv_bytes),
        (_uncompressed, lambda r: "scored uncompressed" in r.notes[-1]),
    ],
    ids=("simulated memory", "answers from a cache", "from before stored bytes", "prompts below their budget"),
)
def test_what_is_no_result_is_marked(results: Path, tmp_path: Path, change: Any, marked: Any) -> None:
    ((folder, _),) = import_results(_changed(results, tmp_path, change), root=tmp_path / "runs", command=())
    assert all(map(marked, load_run(folder)[1]))


def test_refused_results(results: Path, tmp_path: Path) -> None:
    other = _changed(results, tmp_path / "one", lambda stored: stored["config"].pop("kv_method"))
    without = _changed(results, tmp_path / "two", lambda stored: None)
    for samples in without.rglob("samples_*.jsonl"):
        samples.unlink()
    for folder, metric, says in (
        (tmp_path / "absent", None, "no results of kvpolicy in .*--log_samples"),
        (results, "f1", r"has not metric f1 in \[0, 1\].* acc="),
        (other, None, "no results of kvpolicy"),
        (without, None, "no samples beside it"),
    ):
        with pytest.raises(HarnessError, match=says):
            list(import_results(folder, root=tmp_path, metric=metric, command=()))


def test_our_model_joins_lm_evals_own() -> None:
    register()
    register()
    from lm_eval.api.registry import get_model

    from harness.lm_eval.plugin import KVPolicyLM

    assert get_model("kvpolicy") is KVPolicyLM
    assert get_model("hf") is not KVPolicyLM


def test_everything_after_the_verb_is_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []
    monkeypatch.setattr("harness.lm_eval.command_line.run_lm_eval", seen.append)
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers()
    lm_eval_parser(verbs.add_parser("lm-eval", add_help=False, prefix_chars=chr(0)))
    lm_eval_import_parser(verbs.add_parser("lm-eval-import"))
    for typed in (["--model", "kvpolicy", "-t", "a", "--help"], ["ls", "tasks"], ["--metadata={}"], ["-h"], []):
        args = parser.parse_args(["lm-eval", *typed])
        args.action(args, ())
        assert seen[-1] == typed


@pytest.mark.parametrize("flags", [["--device", "cpu"], []])
def test_lm_evals_own_options_inside_model_args_are_refused_first(flags: list[str]) -> None:
    arguments = ["--model", "kvpolicy", "--model_args", "pretrained=tiny,device=cpu", "--tasks", "x", *flags]
    with pytest.raises(HarnessError, match="device=cpu does not belong inside --model_args"):
        run_lm_eval(arguments)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "flags",
    [
        *(
            ["--model_args", x]
            for x in ('{"pretrained": ', "pretrained=\x1b[31m", "pretrained=nowhere/at", "max_length=x")
        ),
        *(
            ["--model_args", x]
            for x in ("method=nope", "method=snapkv,budget=x", "recnt=3", "dtype=float3", "add_bos_token=x")
        ),
        *(
            ["--model_args", f"pretrained=tiny,{x}"]
            for x in ("truncation_side=up", "set=3", "method=5", "budget=1e999")
        ),
        *(["--metadata", "{bad"], ["--config", "none.yaml"], ["--config", "deep.yaml"], ["--config", "odd.yaml"]),
        *(["--config", "list.yaml"], ["--config", "."]),
    ],
)
def test_flags_that_are_refused_before_tasks_are_read(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.yaml").write_text(f"a: {'[' * 1000}")
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "list.yaml").write_text("model: kvpolicy\nmodel_args: [1, 2]\n")
    monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", lambda *args, **options: pytest.fail("tasks are read"))
    tried_command("flags of lm-eval", "lm-eval", "run", "--model", "kvpolicy", "--tasks", "x", *flags)


def test_a_tokenizer_that_ruler_can_read() -> None:
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    ids = get_tokenizer(tokenizer=tokenizer_of("tiny"))("ab").input_ids[1:]
    assert ids == list(tiny_tokenizer().encode("ab", add_special_tokens=False))


def _stored(results: Path) -> dict[str, Any]:
    return dict(json.loads(next(results.rglob("results_*.json")).read_text(encoding="utf-8")))


def _changed(results: Path, where: Path, change: Any) -> Path:
    """A copy of the results with its results file changed."""
    copy = where / "copy"
    copy.mkdir(parents=True)
    for path in results.rglob("*.json*"):
        (copy / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    stored = _stored(copy)
    change(stored)
    next(copy.glob("results_*.json")).write_text(json.dumps(stored), encoding="utf-8")
    return copy
