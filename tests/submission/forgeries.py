"""What a forger edits in a true run, by what refuses it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.records.spec import RunSpec
from harness.submission.archive import MANIFEST, RECORDS
from tasks import load_tasks
from tasks.base import Sample
from tests.submitted import members_of, repacked


@dataclass
class Forged:
    """A run taken apart: what stands in its manifest, and in its records."""

    manifest: dict[str, Any]
    lines: list[dict[str, Any]]
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.manifest["spec"]
        return spec

    def every(self, **fields: Any) -> None:
        for line in self.lines:
            line.update(fields)

    def of(self, method: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["method"].startswith(method)]

    def packed(self, pack: Path) -> Path:
        """Write it where `pack` is, with a run id that is the hash of the spec."""
        run_id = RunSpec.model_validate_json(json.dumps(self.spec)).run_id
        self.manifest["run_id"] = run_id
        self.every(run_id=run_id)
        members = members_of(pack) | {MANIFEST: json.dumps(self.manifest).encode()}
        members[RECORDS] = "".join(json.dumps(line) + "\n" for line in self.lines).encode()
        return repacked(pack, members, run_id=run_id, **self.index)


def rescored(line: dict[str, Any], **changes: Any) -> None:
    """Change a record and let its metrics follow, as one who knows the task would."""
    line.update(changes)
    sample = Sample(line["sample_id"], "", "", tuple(line["answers"]), 8, meta=line["meta"])
    line["metrics"] = dict(load_tasks()[line["task"]].score(sample, line["prediction"]))


FORGERIES: dict[str, tuple[str, Callable[[Forged], Any]]] = {}
"""By name: what refuses it, `none`, `tokenizer`, `rescore` or `stays`, and what it does."""


def forgery(by: str) -> Callable[[Callable[[Forged], Any]], Callable[[Forged], Any]]:
    def register(change: Callable[[Forged], Any]) -> Callable[[Forged], Any]:
        FORGERIES[change.__name__] = by, change
        return change

    return register


@forgery("none")
def a_score_is_raised(run: Forged) -> None:
    run.lines[1]["metrics"]["score"] = 0.9


@forgery("none")
def a_score_is_above_one(run: Forged) -> None:
    run.lines[1]["metrics"]["score"] = 1.5


@forgery("none")
def the_prediction_is_the_reference(run: Forged) -> None:
    run.lines[1]["prediction"] = run.lines[1]["answers"][0]


@forgery("none")
def one_cell_has_its_own_reference(run: Forged) -> None:
    rescored(run.lines[1], answers=[run.lines[1]["prediction"]])


@forgery("none")
def bytes_are_negative(run: Forged) -> None:
    run.lines[1]["kv_bytes"] = -run.lines[1]["kv_bytes"]


@forgery("none")
def bytes_are_an_eighth(run: Forged) -> None:
    for line in run.of("snapkv"):
        line.update({name: line[name] // 8 for name in ("kv_bytes", "stored_bytes")})


@forgery("none")
def less_is_read_than_is_kept(run: Forged) -> None:
    for line in run.of("snapkv"):
        line["read_bytes"] //= 2


@forgery("none")
def more_is_read_than_is_there(run: Forged) -> None:
    run.of("snapkv")[0]["read_bytes"] *= 2


@forgery("none")
def the_full_cache_is_read_by_half(run: Forged) -> None:
    for line in run.of("fullkv"):
        line["read_bytes"] //= 2


@forgery("none")
def the_full_cache_takes_half(run: Forged) -> None:
    for line in run.of("fullkv"):
        line.update({name: line[name] // 2 for name in ("kv_bytes", "stored_bytes")})


@forgery("none")
def the_full_cache_is_said_to_be_larger(run: Forged) -> None:
    for line in run.of("snapkv"):
        line["full_bytes"] *= 2


@forgery("none")
def less_was_asked_for(run: Forged) -> None:
    for line in run.of("snapkv"):
        line["asked_bytes"] //= 2


@forgery("none")
def a_cell_over_its_budget_does_not_say_so(run: Forged) -> None:
    line = run.of("snapkv")[0]
    line.update({name: 2 * line[name] for name in ("kv_bytes", "stored_bytes", "kv_bytes_end", "stored_bytes_end")})


@forgery("none")
def fewer_slots_were_asked_for(run: Forged) -> None:
    run.of("snapkv")[0]["budget_tokens"] = 16


@forgery("none")
def more_slots_are_kept_than_fit(run: Forged) -> None:
    line = run.of("snapkv")[0]
    line["kept_slots"] = [3 * count for count in line["kept_slots"]]


@forgery("none")
def codes_of_one_bit(run: Forged) -> None:
    for method in run.spec["methods"]:
        method["params"]["bits"] = 1
    bytes_are_an_eighth(run)


@forgery("none")
def a_label_in_two_alphabets(run: Forged) -> None:
    relabelled(run, "snapk\u0475@kvcf")


@forgery("none")
def a_method_of_no_registry(run: Forged) -> None:
    relabelled(run, "mykv")


@forgery("none")
def a_preset_that_is_none(run: Forged) -> None:
    relabelled(run, "snapkv@best")


def relabelled(run: Forged, label: str) -> None:
    for line in run.of("snapkv"):
        line["method"] = label
    run.spec["methods"][1].update(label=label, name=label.partition("@")[0])


@forgery("none")
def a_label_of_another_method(run: Forged) -> None:
    run.spec["methods"][1]["name"] = "compilerkv"


@forgery("none")
def a_budgeted_method_is_said_to_need_none(run: Forged) -> None:
    run.spec["methods"][1]["budgeted"] = False
    run.lines[:] = [line for line in run.lines if not line["method"].startswith("snapkv") or line["budget"] == "32"]
    for line in run.of("snapkv"):
        line.update(budget="full", budget_tokens=None)
    run.manifest["cells"] = 4


@forgery("none")
def more_tokens_compressed_than_prompted(run: Forged) -> None:
    run.every(prompt_tokens=100)


@forgery("none")
def a_bad_cell_is_out_of_memory(run: Forged) -> None:
    lost(next(line for line in run.of("snapkv") if line["budget"] == "32"), "oom")


def lost(line: dict[str, Any], status: str) -> None:
    nothing = {"prediction": "", "token_ids": [], "nll": None, "nll_first": None, "nll_tokens": 0, "metrics": {}}
    line.update(status=status, error="lost", **nothing)


@forgery("none")
def a_bad_sample_is_left_out(run: Forged) -> None:
    first = run.lines[0]["sample_id"]
    run.lines[:] = [line for line in run.lines if line["sample_id"] != first]
    run.manifest["samples"] -= 1


@forgery("none")
def a_cell_is_left_out(run: Forged) -> None:
    del run.lines[2]


@forgery("none")
def a_cell_is_there_twice(run: Forged) -> None:
    run.lines.append(run.lines[2])


@forgery("none")
def an_interrupted_run_is_whole(run: Forged) -> None:
    run.manifest["status"] = "interrupted"


@forgery("none")
def a_run_of_nothing(run: Forged) -> None:
    run.lines.clear()
    run.manifest.update(samples=0, cells=0)
    run.spec.update(tasks=[], methods=[])


@forgery("none")
def more_tokens_than_the_run_allows(run: Forged) -> None:
    run.lines[0]["token_ids"] = [5] * 7


@forgery("none")
def an_answer_without_tokens(run: Forged) -> None:
    rescored(run.lines[0], token_ids=[], prediction="return")


@forgery("none")
def a_likelihood_that_is_no_number(run: Forged) -> None:
    run.lines[0]["nll"] = float("nan")


@forgery("none")
def a_negative_likelihood(run: Forged) -> None:
    run.lines[0].update(nll=-3.0, nll_first=-4.0)


@forgery("none")
def negative_seconds(run: Forged) -> None:
    run.lines[0]["compress_s"] = -1.0


@forgery("tokenizer")
def references_that_fit_the_predictions(run: Forged) -> None:
    for line in run.lines:
        first = next(other for other in run.lines if other["sample_id"] == line["sample_id"])
        rescored(line, answers=[first["prediction"] or "a"])


@forgery("tokenizer")
def easier_prompts(run: Forged) -> None:
    for line in run.lines:
        line["prompt_sha256"] = hashlib.sha256(line["sample_id"].encode()).hexdigest()


@forgery("tokenizer")
def the_samples_of_a_larger_draw_that_went_well(run: Forged) -> None:
    for line in run.lines:
        line["sample_id"] = line["sample_id"].rpartition("/")[0] + f"/{7 + int(line['sample_id'].rpartition('/')[2])}"


@forgery("tokenizer")
def a_seed_that_went_well(run: Forged) -> None:
    run.spec["seed"] = 7
    run.every(seed=7)


@forgery("tokenizer")
def more_tokens_than_the_task_allows(run: Forged) -> None:
    run.spec["max_new_tokens"] = None
    for line in run.lines:
        line["token_ids"] = (line["token_ids"] or [5]) * 200


@forgery("tokenizer")
def tokens_that_say_something_else(run: Forged) -> None:
    for line in run.lines:
        rescored(line, prediction=line["answers"][0])


@forgery("tokenizer")
def a_likelihood_of_fewer_tokens(run: Forged) -> None:
    run.every(nll_tokens=1)
    for line in run.lines:
        line["nll_first"] = line["nll"]


@forgery("tokenizer")
def a_run_of_another_model(run: Forged) -> None:
    run.spec["model"]["revision"] = "0" * 64


@forgery("rescore")
def tokens_and_prediction_of_the_reference(run: Forged) -> None:
    ids = {line["sample_id"]: line["token_ids"] for line in run.of("fullkv")}
    said = {line["sample_id"]: line["prediction"] for line in run.of("fullkv")}
    for line in [*run.of("snapkv"), *run.of("streamingllm")]:
        rescored(line, token_ids=ids[line["sample_id"]], prediction=said[line["sample_id"]])


@forgery("rescore")
def a_likelihood_below_the_models(run: Forged) -> None:
    for line in run.lines:
        line.update(nll=line["nll"] / 2, nll_first=line["nll_first"] / 2)


@forgery("rescore")
def slots_and_bytes_of_an_eighth(run: Forged) -> None:
    for line in run.lines:
        if line["budget"] != "full":
            line["kept_slots"] = [count // 8 for count in line["kept_slots"]]
            line.update({name: line[name] // 8 for name in ("kv_bytes", "stored_bytes", "read_bytes")})


@forgery("rescore")
def bad_cells_have_failed(run: Forged) -> None:
    for line in [*run.of("snapkv"), *run.of("streamingllm")]:
        lost(line, "failed")


@forgery("rescore")
def two_methods_change_places(run: Forged) -> None:
    one, other = (method["label"] for method in run.spec["methods"][1:])
    for line in run.lines:
        line["method"] = {one: other, other: one}.get(line["method"], line["method"])


@forgery("rescore")
def another_window_than_the_label_says(run: Forged) -> None:
    run.spec["methods"][1]["params"]["recent"] = 4
    run.spec["methods"][2]["params"]["sinks"] = 0


@forgery("stays")
def seconds_are_halved(run: Forged) -> None:
    for line in run.lines:
        line.update({name: line[name] / 2 for name in ("prefill_s", "compress_s", "decode_s")})


@forgery("stays")
def observing_costs_nothing(run: Forged) -> None:
    run.every(observe_ms=0.0)


@forgery("stays")
def another_commit_made_it(run: Forged) -> None:
    run.manifest["git_commit"] = "c0ffee"


@forgery("stays")
def a_day_that_never_was(run: Forged) -> None:
    run.manifest.update(started="2020-01-01T00:00:00+00:00", finished="2020-01-01T00:00:01+00:00")
