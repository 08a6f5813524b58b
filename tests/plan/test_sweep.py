"""What a sweep is turned into, and what is refused before anything runs."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.errors import HarnessError, one_line
from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer
from harness.plan.methods import PlannedMethod, plan_method, plan_methods
from harness.plan.names import check_sweep, plan_tasks
from harness.plan.sweep import (
    NO_TEMPLATE,
    PlannedCell,
    check_budgets,
    contexts,
    plan_budgets,
    plan_cells,
    plan_names,
    plan_samples,
    run_spec,
)
from harness.records.spec import Sweep
from harness.speed.asked import BenchAsk
from methods.base import Budget
from methods.snapkv import SnapKV
from tasks.base import About, Sample, Task, TaskError, TaskOptions
from tasks.longbench import DATASETS
from tests.task_data import longbench_row, write_rows


def sweep(**options: Any) -> Sweep:
    return Sweep.model_validate({"methods": ("snapkv",), "tasks": ("stdlib",), "model": "tiny", **options})


def cells_of(methods: Sequence[PlannedMethod], *budgets: str) -> list[PlannedCell]:
    return plan_cells(methods, map(Budget.parse, budgets))


@dataclass
class Fixed(Task):
    """Samples as given."""

    given: list[Sample] = field(default_factory=list)
    trouble: str = ""
    name = "fixed"
    about = About("made here", "", "none", "exact", 2)

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        if self.trouble:
            raise TaskError(self.trouble)
        yield from self.given[: options.limit]

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": float(prediction in sample.answers)}

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        return {"seed": options.seed, "lengths": list(options.lengths)}


SAMPLE = Sample(id="0", context="c" * 40, question="q" * 10, answers=("gold",), max_new_tokens=20, chat=False)


def test_what_a_sample_marks_reaches_the_engine(tiny: LoadedModel) -> None:
    marked = replace(SAMPLE, context="keep this, not that", meta={"protect": ["keep this"], "needles": ["that"]})
    (planned,), *_ = plan_samples(sweep(), [Fixed([marked])], tiny)
    prompt = planned.prompt(TaskTokenizer(tiny.tokenizer), tiny, None)

    def text(places: Sequence[int]) -> str:
        return str(tiny.tokenizer.decode([prompt.ids[at] for at in places]))

    assert (text(prompt.protected), text(prompt.needle)) == ("keep this", "that")


def test_a_data_set_that_nothing_fits_of_is_left_out(
    tiny: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    by_name = {dataset.name: dataset for dataset in DATASETS}
    write_rows(tmp_path, "trec", [longbench_row(by_name["trec"])])
    write_rows(tmp_path, "qasper", [longbench_row(by_name["qasper"], context="word " * 9000)])
    asked = sweep(tasks=("longbench/qasper", "longbench/trec"), data_dir=str(tmp_path), whole=True)
    samples, specs, _ = plan_samples(asked, check_sweep(asked), tiny)
    assert [spec.name for spec in specs] == ["longbench/trec"] and len(samples) == 1
    assert "longbench/qasper is left out: no row of qasper.jsonl fits" in caplog.text
    alone = asked.model_copy(update={"tasks": ("longbench/qasper",)})
    with pytest.raises(HarnessError, match=r"^no task is left: longbench/qasper: no row of qasper\.jsonl fits"):
        plan_samples(alone, check_sweep(alone), tiny)


def test_methods_carry_their_parameters_and_overrides_their_names() -> None:
    asked = sweep(methods=("snapkv@kvcf", "fullkv", "snapkv@kvcf"), set={"snapkv.kernel": 5})
    planned = plan_methods(asked)
    assert [spec.label for spec, _ in planned] == ["snapkv@kvcf[kernel=5]", "fullkv"]
    spec, policy = planned[0]
    assert policy == SnapKV(recent=8, kernel=5, pool="max")
    assert spec.params == {"recent": 8, "kernel": 5, "pool": "max", "forward": False, "tables": ""}
    assert (spec.name, spec.budgeted, planned[1][0].budgeted) == ("snapkv", True, False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ("snapkv@papre",)}, "unknown preset 'papre' of snapkv; did you mean 'paper'"),
        ({"set": {"snapkv": {"recent": 4}}}, "'snapkv' names no method of this run"),
        ({"set": {"snapkv.recent": 1.5}}, "recent=1.5: Input should be a valid integer"),
        ({"set": {"snapkv.recent": True}}, "recent=True: Input should be a valid integer"),
        ({"set": {"snapkv.recent": [1]}}, "valid integer"),
        ({"set": {"snapkv.pool": "median"}}, "pool='median': Input should be 'max' or 'avg'"),
        ({"methods": ("h2o",), "set": {"h2o.evict": 1}}, "evict=1: Input should be a valid boolean"),
        ({"methods": ("compilerkv",), "set": {"compilerkv.tables": "absent-folder"}}, "absent-folder"),
    ],
)
def test_unusable_methods_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(HarnessError) as error:
        plan_methods(sweep(**options))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_cells_are_every_method_at_every_budget_once() -> None:
    asked = sweep(methods=("fullkv", "snapkv", "random"), budgets=("64", "0.25", "25%", "64"))
    cells = plan_cells(plan_methods(asked), asked.parsed_budgets)
    names = [("fullkv", "full"), ("snapkv", "64"), ("snapkv", "0.25"), ("random", "64"), ("random", "0.25")]
    assert [(cell.method, cell.budget) for cell in cells] == names
    assert cells[0].cell.budget is None
    assert cells_of([plan_method("fullkv")])[0].budget == "full"
    with pytest.raises(HarnessError, match="no budget asked for"):
        cells_of(plan_methods(sweep()))


@pytest.mark.parametrize(
    ("own", "typed", "budgets"),
    [
        (("gvote",), None, ("=gvote",)),  # what it keeps is all that is asked
        (("gvote",), ("64", "25%"), ("64", "0.25", "=gvote")),
        (("gvote",), ("=gvote",), ("=gvote",)),
        (("gvote@p90", "gvote"), None, ("=gvote@p90", "=gvote")),
        (("gvote@p90", "gvote"), ("64", "=gvote@p90"), ("64", "=gvote@p90")),
        ((), None, ("128", "256", "512")),
    ],
)
def test_others_are_run_at_what_a_method_of_its_own_budget_keeps(
    own: tuple[str, ...], typed: tuple[str, ...] | None, budgets: tuple[str, ...]
) -> None:
    asked = sweep(methods=("fullkv", *own, "snapkv"), **({} if typed is None else {"budgets": typed}))
    methods = plan_methods(asked)
    cells = plan_cells(methods, plan_budgets(asked, methods))
    names = [("fullkv", "full"), *((label, "own") for label in own), *(("snapkv", text) for text in budgets)]
    assert [(cell.method, cell.budget) for cell in cells] == names
    policies = {f"={spec.label}": policy for spec, policy in methods}
    for cell in cells:
        given = cell.cell.like
        assert (given is not None) == cell.budget.startswith("=") and (cell.cell.budget is None or given is None)
        assert given is None or (str(given), given.policy) == (cell.budget, policies[cell.budget])


def test_changed_parameters_of_a_method_are_in_the_name_of_what_it_keeps() -> None:
    asked = sweep(methods=("gvote@p99", "snapkv"), set={"gvote.seed": 3}, budgets=("=gvote@p99",))
    methods = plan_methods(asked)
    assert list(map(str, plan_budgets(asked, methods))) == ["=gvote@p99[seed=3]"]
    assert (methods[0].spec.own, methods[0].spec.budgeted, methods[1].spec.own) == (True, False, False)


@pytest.mark.parametrize("budget", ["=gvote", "=", "=snapkv", "=fullkv"])
def test_what_no_method_of_the_run_keeps_is_no_budget(budget: str) -> None:
    asked = sweep(methods=("gvote@p90", "snapkv", "fullkv"), budgets=(budget,))
    with pytest.raises(HarnessError, match=r"no method of this run is that one; this run has gvote@p90; add it to"):
        plan_budgets(asked, plan_methods(asked))
    with pytest.raises(ValidationError, match="what a method keeps is known in `harness run` alone"):
        BenchAsk(methods=("gvote", "snapkv"), budgets=("=gvote",))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"budgets": ("64", budget)}, "budget ") for budget in ("0", "-1", "1.5", "0.0", "many", "150%")),
        ({"methods": ()}, "no methods asked for; add --methods"),
        ({"tasks": ()}, "no tasks asked for; add --tasks"),
        ({"lengths": ()}, "no lengths asked for"),
        ({"budegts": ("64",)}, "option budegts: Extra inputs are not permitted"),
        ({"lengths": (64, 0)}, "--lengths 0 is too small; give at least 1"),
        ({"limit": 0}, "--limit 0 is too small; give at least 1"),
        ({"max_tokens": -1}, "--max-tokens -1 is too small"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 is too small"),
        ({"nll_tokens": -1}, "--nll-tokens -1 is negative; give 0 to turn it off"),
        ({"observe": -1}, "--observe -1 is negative; give 0 to turn it off"),
        ({"measure": True, "query": "agnostic"}, "--measure with --query agnostic"),
        ({"measure": True, "trust_remote_code": True}, "--measure with --trust-remote-code"),
    ],
)
def test_an_illegal_sweep_cannot_be_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        sweep(**options)
    line = str(one_line(refused.value))
    assert line.startswith(says) and "\n" not in line


def test_tasks_are_found_by_name_and_family() -> None:
    assert [task.name for task in plan_tasks(sweep(tasks=("stdlib/next_line",)))] == ["stdlib/next_line"]
    assert len(plan_tasks(sweep(tasks=("stdlib", "stdlib/next_line")))) == 2
    with pytest.raises(HarnessError, match="unknown task 'stdlb'; did you mean 'stdlib'"):
        plan_tasks(sweep(tasks=("stdlb",)))


def test_a_task_for_hidden_questions_is_not_run_with_shown_ones() -> None:
    hidden = ("multiquery/niah",)
    assert [task.name for task in plan_tasks(sweep(tasks=hidden, query="agnostic"))] == [*hidden]
    with pytest.raises(HarnessError, match="niah is made for --query agnostic, this run is aware; change one"):
        plan_tasks(sweep(tasks=hidden, query="aware"))


def test_the_query_mode_is_the_tasks_own_where_none_is_asked_for_and_all_agree() -> None:
    hidden, shown = ("multiquery/niah", "relay/needle"), ("stdlib/next_line",)
    assert plan_names(sweep(tasks=hidden)).sweep == sweep(tasks=hidden, query="agnostic")
    assert plan_names(sweep(tasks=shown)).sweep.query == "aware"
    with pytest.raises(HarnessError, match="multiquery/niah is made for --query agnostic, this run is aware"):
        plan_names(sweep(tasks=(*shown, *hidden)))
    with pytest.raises(HarnessError, match="--measure with --query agnostic"):
        plan_names(sweep(tasks=hidden, measure=True))


def test_neighbours_with_one_context_are_prefilled_together(tiny: LoadedModel) -> None:
    given = [replace(SAMPLE, id="a"), replace(SAMPLE, id="b", question="other"), replace(SAMPLE, id="c", context="d")]
    planned = plan_samples(sweep(), [Fixed([*given, replace(given[0], id="e")])], tiny)[0]
    assert [[one.sample.id for one in group] for group in contexts(planned, "agnostic")] == [["a", "b"], ["c"], ["e"]]
    assert [[one.sample.id for one in group] for group in contexts(planned, "aware")] == [["a"], ["b"], ["c"], ["e"]]


def test_a_model_without_a_chat_template_is_noted(tiny: LoadedModel) -> None:
    chat = replace(SAMPLE, chat=True)
    bare = copy.deepcopy(tiny.tokenizer)
    bare.chat_template = None
    for tokenizer, sample, notes in ((tiny.tokenizer, chat, ()), (bare, SAMPLE, ()), (bare, chat, (NO_TEMPLATE,))):
        planned = plan_samples(sweep(), [Fixed([sample])], replace(tiny, tokenizer=tokenizer))[0]
        assert planned[0].notes == notes


def test_samples_become_token_ids_with_a_border_and_an_answer(tiny: LoadedModel) -> None:
    task = Fixed([SAMPLE, replace(SAMPLE, id="1", answers=(), answer_prefix=" so")])
    planned, specs, limit = plan_samples(sweep(lengths=(64,)), [task], tiny)
    assert limit == tiny.context
    about = {"source": "made here", "revision": "", "licence": "none", "metric": "exact", "samples": 2}
    told = {"name": "fixed", "protocol": "official", "provenance": {**about, "seed": 42, "lengths": [64]}}
    assert specs[0].model_dump() == told
    encode = TaskTokenizer(tiny.tokenizer).encode
    first, second = planned
    assert first.ids.tolist() == [tiny.tokenizer.bos_token_id, *encode("c" * 40 + "q" * 10)]
    assert first.context == 1 + 40
    assert (first.answer, second.answer) == (tuple(encode(" gold")), ())  # a word does not glue to the one before it
    assert second.ids.tolist()[-3:] == encode(" so")
    assert first.sha256 != second.sha256
    assert plan_samples(sweep(limit=1), [task], tiny)[0] == planned[:1]
    for most, answer in ((2, " g"), (0, "")):
        assert plan_samples(sweep(nll_tokens=most), [task], tiny)[0][0].answer == tuple(encode(answer))


@pytest.mark.parametrize(
    ("question", "reference", "read"),
    [("q ", "gold", "gold"), ("q", " gold", " gold"), ("q", "金", "金"), ("q\n", "gold", "gold"), ("q", "7", " 7")],
)
def test_an_answer_is_read_as_text_that_goes_on(tiny: LoadedModel, question: str, reference: str, read: str) -> None:
    sample = replace(SAMPLE, question=question, answers=(reference,))
    answer = plan_samples(sweep(), [Fixed([sample])], tiny)[0][0].answer
    assert TaskTokenizer(tiny.tokenizer).decode(answer) == read


def test_limits_are_the_sample_s_own_with_the_sweep_s_cap(tiny: LoadedModel) -> None:
    sample = replace(SAMPLE, stop=("\n", "END"), min_new_tokens=1)
    planned = plan_samples(sweep(), [Fixed([sample])], tiny)[0][0]
    tokenizer = TaskTokenizer(tiny.tokenizer)
    for cap, new in ((None, 20), (8, 8), (99, 20)):
        prompt = planned.prompt(tokenizer, tiny, cap)
        assert prompt.limits.max_new_tokens == new
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    assert prompt.limits.eos_ids == tiny.eos_ids | set(newline)  # a stop of one token is an end, barred at first
    assert (prompt.limits.min_new_tokens, prompt.limits.stop) == (1, ("\n", "END"))
    assert prompt.limits.ends(tokenizer.encode("abcEND"))
    ends = replace(SAMPLE, end_tokens=("\n", "END"), min_new_tokens=1)
    limits = plan_samples(sweep(), [Fixed([ends])], tiny)[0][0].prompt(tokenizer, tiny, None).limits
    assert (limits.eos_ids, limits.stop) == (tiny.eos_ids | set(newline), ())  # one token, and no text, ends it
    assert (list(prompt.ids), prompt.context, prompt.answer) == (planned.ids.tolist(), 41, planned.answer)


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        (Fixed([]), {}, "task fixed has no samples"),
        (Fixed(trouble="no such file"), {}, "task fixed: no such file"),
        (Fixed([replace(SAMPLE, context="c" * 4100)]), {}, "sample 0: a prompt of 4111 tokens and 20 generated ones"),
        (Fixed([SAMPLE]), {"max_tokens": 70}, "a prompt of 51 tokens and 20 generated ones exceed 70"),
        (Fixed([SAMPLE]), {"max_tokens": 5000}, "--max-tokens 5000 exceeds the model's context of 4096; lower it"),
    ],
)
def test_samples_that_cannot_run_are_refused(
    tiny: LoadedModel, task: Fixed, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(HarnessError, match=says):
        plan_samples(sweep(**options), [task], tiny)
    for limits in ({"max_tokens": 71}, {"max_tokens": 61, "max_new_tokens": 10}):  # where it just fits
        assert plan_samples(sweep(**limits), [Fixed([SAMPLE])], tiny)[2] == limits["max_tokens"]


def test_a_budget_above_every_prompt_of_a_task_is_refused(tiny: LoadedModel) -> None:
    planned = plan_samples(sweep(), [Fixed([SAMPLE, replace(SAMPLE, id="1", context="c" * 20)])], tiny)[0]
    methods = plan_methods(sweep(methods=("fullkv", "snapkv")))
    check_budgets(planned, cells_of(methods, "50", "0.9"), "aware")  # below the longest: single ones are skipped
    for budget, query, longest in (("51", "aware", 51), ("41", "agnostic", 41), ("100%", "aware", 51)):
        with pytest.raises(HarnessError, match=f"not below any prompt of fixed, the longest has {longest} tokens"):
            check_budgets(planned, cells_of(methods, "8", budget), query)  # type: ignore[arg-type]
    check_budgets(planned, cells_of(methods, "41"), "aware")
    check_budgets(planned, cells_of([plan_method("fullkv")]), "aware")


def test_the_run_id_depends_on_what_decides_the_numbers(tiny: LoadedModel) -> None:
    def run_id(**options: Any) -> str:
        asked = sweep(**options)
        methods = tuple(spec for spec, _ in plan_methods(asked))
        tasks = plan_samples(asked, [Fixed([SAMPLE])], tiny)[1]
        return run_spec(asked, tiny, methods=methods, tasks=tasks, max_tokens=100).run_id

    base = run_id()
    assert base == run_id() == run_id(budgets=("128", "256", "512")) == run_id(device="cpu", data_dir="elsewhere")
    changes: dict[str, Any] = {
        **{"seed": 7, "limit": 3, "budgets": ("64",), "methods": ("snapkv@kvcf",), "set": {"snapkv.kernel": 3}},
        **{"first_token": "prefill", "query": "agnostic", "nll_tokens": 3, "max_new_tokens": 5, "lengths": (64,)},
        "contexts": "protocol",
    }
    assert len({base, *(run_id(**{name: value}) for name, value in changes.items())}) == len(changes) + 1
