"""`harness compile` on the tiny model: from a corpus to tables that a run can use, resumed and refused as it should."""

import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cli import main
from harness.compiler import estimators, paper_tables
from harness.compiler.asked import CompileSpec
from harness.compiler.compile import Compiler
from harness.compiler.paper_check import ARMS, NEUTRAL, arms
from harness.compiler.rollouts import Rollout
from harness.compiler.stage import CHOICE_PROMPTS
from harness.errors import HarnessError
from harness.models.prompt import token_sha256
from harness.records.run_folder import find_runs, load_run
from methods.base import Sizes
from methods.compilerkv.form import Form
from methods.compilerkv.policy import CompilerKV
from methods.compilerkv.tables import load_tables
from methods.headkv import BETAS
from tests.tiny_run import FAST

FORMS = (Form(window=4, kernel=9, whole=0.3), Form(window=8, kernel=9, whole=0.0), Form(window=8, kernel=1, whole=0.0))


@pytest.fixture(autouse=True, scope="module")
def _few() -> Iterator[None]:
    """Few forms, shuffles, rows of a design and rounds: what is compiled is the same, in seconds."""
    few = {"compile.FORMS": FORMS, "compile.GATES": (0.0, 0.8), "compile.SHUFFLES": 4, "estimators.PAIRS": 2}
    few |= {"estimators.STRENGTH_PROMPTS": 4, "paper_tables.PAIRS": 2, "paper_tables.MOST_ROUNDS": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in few.items():
            patch.setattr(f"harness.compiler.{name}", value)
        yield


def spec(corpus: Path, **changes: Any) -> CompileSpec:
    small = {"prompts": 20, "lengths": (600, 800), "answer": 4, "budgets": (64, 128), "steps": 8}
    fixed = {"model": "tiny", "dtype": "float32", "device": "cpu", "corpora": (str(corpus),)}
    return CompileSpec.model_validate({**fixed, **small, **changes})


@pytest.fixture(scope="module")
def compiled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    Compiler(spec(corpus), folder).compile(("harness", "compile"))
    return folder


def rollouts(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def earned(gains: dict[str, Any]) -> bool:
    return all(gains[f"over_{rival}"]["low"] > 0 for rival in ("uniform", "shuffled"))


def test_an_artefact_says_what_it_is_and_how_sure(compiled: Path, corpus: Path) -> None:
    tables = load_tables(compiled)
    manifest = tables.manifest
    assert (manifest.kind, manifest.model, manifest.budgets, manifest.seed) == ("compiled", "tiny", (64, 128), 0)
    assert manifest.command == ("harness", "compile") and tables.budget.shape == (2, 4, 2)
    prompts = Compiler(spec(corpus), compiled).bench.prompts
    assert len(prompts) == 20 and set(manifest.prompts) == {token_sha256(prompt.ids) for prompt in prompts}
    assert {prompt.family for prompt in prompts} == {"continuation", "copy", "needle", "multikey", "tracking"}
    report = manifest.report
    assert (report["training_prompts"], report["validation_prompts"]) == (15, 5)
    assert -1 <= report["halves_spearman"] <= 1
    first, form = (Form.model_validate_json(next(iter(report[stage]["best"]))) for stage in ("form", "basis"))
    assert first in FORMS and form.model_copy(update={"basis": first.basis, "gate": first.gate}) == first
    assert form == manifest.form
    for i, budget in enumerate((64, 128)):
        gains = {rival: report["validation"][str(budget)][f"over_{rival}"] for rival in ("uniform", "shuffled")}
        assert all(gain["low"] <= gain["mean"] <= gain["high"] for gain in gains.values())
        why = next((f"gain over {rival}" for rival, gain in gains.items() if gain["low"] <= 0), "")
        assert bool(why) == (f"budget {budget}" in manifest.neutral) == bool((tables.budget[i] == 1).all())
        assert manifest.neutral.get(f"budget {budget}", "").startswith(why)
        risk = report["risk"][str(budget)]
        assert tables.risk[i, :, 0].tolist() == (risk["slopes"] if earned(risk) else [0, 0])
        assert earned(risk) == (f"risk {budget}" not in manifest.neutral)


class Stop(Exception):
    """Ends a compilation in the middle."""


def test_the_same_seed_gives_the_same_tables_and_a_stopped_compilation_goes_on(
    compiled: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped four times, after 11 prefills each: what is stored is not computed again, and the tables are the same."""
    made, kept = [], []

    def prepare(*arguments: Any) -> Rollout:
        made.append(None)
        if len(made) in (12, 24, 36, 48):
            kept.append({path.name for path in tmp_path.glob("*.state")})
            raise Stop
        return Rollout(*arguments)

    monkeypatch.setattr("harness.compiler.stage.Rollout", prepare)
    monkeypatch.setattr(estimators, "KEEP_EVERY", 3)
    for _ in range(4):
        with pytest.raises(Stop):
            Compiler(spec(corpus), tmp_path).compile(())
    tables = Compiler(spec(corpus), tmp_path).compile(())
    assert {"all.state"} in kept  # once between the first estimate and the last
    assert torch.equal(tables.budget, load_tables(compiled).budget)
    assert tables.manifest.report == load_tables(compiled).manifest.report
    keys, undisturbed = ([(line["stage"], line["prompt"]) for line in rollouts(at)] for at in (tmp_path, compiled))
    assert len(keys) == len(set(keys)) and set(keys) == set(undisturbed)


def test_a_run_uses_the_tables_but_not_on_their_own_prompts(
    compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", *FAST, "--methods", "compilerkv", "--budgets", "64", "--limit", "2", "--set"]
    assert main([*run, f"compilerkv.tables={compiled}", "--out", str(tmp_path)]) == 0
    manifest, records = load_run(*find_runs(tmp_path))
    assert [record.status for record in records] == ["ok", "ok"]
    assert manifest.spec.methods[0].params["tables_sha256"] == load_tables(compiled).manifest.tensors_sha256
    assert all(sum(record.kept_slots) == 64 * 4 * 2 for record in records)
    fields, seen = json.loads((compiled / "manifest.json").read_text()), tmp_path / "seen"
    shutil.copytree(compiled, seen)
    for changed, complaint in (
        ({"prompts": [records[1].prompt_sha256]}, "was fitted on sample"),
        ({"model_revision": "another"}, "this model is"),
    ):
        (seen / "manifest.json").write_text(json.dumps(fields | changed))
        assert main([*run, f"compilerkv.tables={seen}", "--out", str(tmp_path / "other")]) == 2
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--corpus", "kvj"], "did you mean 'kjv'"),
        (["--prompts", "3"], "prompts"),
        (["--lengths", "600"], "lengths"),
        (["--lengths", "5000,6000"], "exceed"),
        (["--steps", "0"], "steps"),
        (["--lengths", "40,80"], "no token before the observation window of 64"),
        (["--lengths", "1100,1400", "--prompts", "20", "--published"], "15 training prompts do not fill 20 risk bins"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--corpus", str(corpus)] if "--corpus" not in arguments else []
    assert main(["compile", "--model", "tiny", "--out", str(tmp_path / "out"), *given, *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("harness: ") and says in err


def test_a_loss_that_is_no_number_stops_the_compilation(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.full((3,), float("nan"))
    monkeypatch.setattr(Rollout, "losses", lambda *_: (nothing, nothing))
    with pytest.raises(HarnessError, match=r"prompt made/continuation/0 have losses that are no numbers"):
        Compiler(spec(corpus), tmp_path).compile(())
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_what_is_damaged_or_of_another_specification_is_named(compiled: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    with pytest.raises(HarnessError, match="holds another compilation"):
        Compiler(spec(corpus, seed=1), tmp_path)
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"stage": "form", "prom')  # what a kill leaves
    Compiler(spec(corpus), tmp_path)
    (tmp_path / "all.state").write_bytes(b"no state")
    with pytest.raises(HarnessError, match=r"all.state is damaged.*delete it"):
        Compiler(spec(corpus), tmp_path).compile(())
    (tmp_path / "rollouts.jsonl").write_text('{"stage": 1}\n')
    with pytest.raises(HarnessError, match=r"rollouts.jsonl line 1 is damaged"):
        Compiler(spec(corpus), tmp_path)


@pytest.fixture(scope="module")
def asked(compiled: Path, corpus: Path) -> CompileSpec:
    """Both kinds of tables, the form taken over and the budgets by ridge."""
    return spec(corpus, prompts=28, published=True, estimator="ridge", form=str(compiled))


@pytest.fixture(scope="module")
def learned(asked: CompileSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    Compiler(asked, folder).compile(())
    return folder


def test_published_tables_hold_published_actions(learned: Path, asked: CompileSpec) -> None:
    compiler = Compiler(asked, learned)
    found, report = paper_tables.Published(compiler.bench, compiler.signals()).compile()
    values = {"head": torch.linspace(0.8, 1.5, 29), "gate": torch.linspace(0.8, 1.0, 21)}
    for name in ARMS:
        table = found[name].flatten()
        off = table[:, None] - values[name.removesuffix("_alone")]
        assert bool((off.abs().min(dim=1).values < 1e-5).all()) and len(table.unique()) > 3
    tables = load_tables(learned)
    agreed = tables.manifest.report["split_half"]
    assert agreed.keys() == {"64", "128"} and all(-1 <= own["mean"] <= 1 for own in agreed.values())
    assert "ridge" in tables.manifest.source and "Q-learning" in tables.manifest.source
    assert report | {"validation": {}} == tables.manifest.report["published"] | {"validation": {}}
    assert report["rounds"] == len(report["changed"]) <= 2
    assert report["occupied_risk_bins"] == int((tables.gate_support[0, 0] > 0).sum())
    assert report["unsupported"]["head"] == 0
    assert report["unsupported"]["gate"] == int((tables.gate_support == 0).sum())
    assert bool((found["gate"][tables.gate_support == 0] == 0.8).all())
    assert set(tables.head_support.unique().tolist()) == {4 * report["training"]}  # 2 mirrored pairs
    stages = {line["stage"] for line in rollouts(learned) if " against " in line["stage"]}
    neutral_gate = paper_tables.checksum(torch.full((2, 4, 20, 4), 0.8))
    assert {stage.split()[0] for stage in stages} == {"head", "gate"} and f"head against {neutral_gate[:12]}" in stages


def test_rollouts_of_the_published_form_keep_what_its_runtime_keeps(learned: Path, asked: CompileSpec) -> None:
    bench = Compiler(asked, learned).bench
    tables, rollout = load_tables(learned), bench.rollout(0)
    seen = paper_tables.Observed(rollout)
    weights, thresholds = tables.lookup(64, entropy=seen.entropy, perplexity=seen.perplexity)
    found, candidates = seen.lose(weights[None], thresholds[None], 64)
    kvs = CompilerKV(form="published", tables=str(learned)).compress(rollout.view, 64)
    expected = rollout.losses(rollout.logprobs(rollout.kept(kvs)))[1]
    torch.testing.assert_close(found, expected)
    assert [max(1, min(64, int(n))) for n in candidates[0]] == [int(kv.live[0, 0]) for kv in kvs]


def test_a_published_table_stays_only_where_it_beats_its_shuffles(learned: Path) -> None:
    tables = load_tables(learned)
    gained, reasons = tables.manifest.report["published"]["validation"], tables.manifest.neutral
    for name, (row, budget) in product(ARMS, enumerate(tables.manifest.budgets)):
        own, value = earned(gained[f"{name} {budget}"]), NEUTRAL[name.removesuffix("_alone")]
        assert own or bool((getattr(tables, name)[row] == value).all())
        assert own == (f"{name} {budget}" not in reasons)


def test_published_arms_differ_from_the_table_in_one_thing_only() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(2, 3, 4, generator=draw) for name in ("head", "head_alone")}
    tensors |= {name: torch.rand(2, 3, 20, 4, generator=draw) for name in ("gate", "gate_alone")}
    found = arms(tensors, 1, seed=0)
    for name in ARMS:
        kind = int(name.startswith("gate"))
        plain, own, *shuffled = (pair[kind] for pair in found[name])
        assert len({id(pair[1 - kind]) for pair in found[name]}) == 1 and torch.equal(own, tensors[name][1])
        assert set(plain.unique().tolist()) == {torch.tensor(NEUTRAL[name.removesuffix("_alone")]).item()}
        for other in shuffled:
            assert not torch.equal(other, own) and torch.equal(other.flatten().sort()[0], own.flatten().sort()[0])
    assert torch.equal(found["head"][0][1], tensors["gate"][1])
    assert bool((found["head_alone"][0][1] == 0.8).all())


def test_tables_share_their_folder_with_the_published_ones_and_take_over_a_form(
    compiled: Path, learned: Path, asked: CompileSpec
) -> None:
    compiler = Compiler(asked.model_copy(update={"published": False}), learned)
    assert compiler.choose_form() == (load_tables(compiled).manifest.form, {"form": {"taken_from": str(compiled)}})
    assert '"form"' not in (learned / "rollouts.jsonl").read_text()


def test_tables_may_be_made_without_a_family_and_say_so(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families = ("copy", "repeated", "records")
    tables = Compiler(spec(corpus, families=families, prompts=16, steps=2), tmp_path).compile(("harness", "compile"))
    bench = Compiler(spec(corpus, families=families, prompts=16, steps=2), tmp_path).bench
    assert {prompt.family for prompt in bench.prompts} == {*families}
    assert [bench.prompts[at].family for at in bench.validation].count("repeated") == 1
    assert tables.manifest.corpus.startswith("16 prompts (copy, repeated, records) of ")
    assert main(["compile", "--families", "coppy", "--out", str(tmp_path)]) == 2
    assert "--families 'coppy' is none; did you mean 'copy'?; give some of continuation" in capsys.readouterr().err


def test_importance_is_attention_on_what_is_asked_for_and_the_pool_loses_least(compiled: Path, corpus: Path) -> None:
    tables, bench = load_tables(compiled), Compiler(spec(corpus), compiled).bench
    asked = [at for at in bench.training if bench.prompts[at].needle]
    assert {bench.prompts[at].family for at in asked} == {"copy", "needle", "multikey", "tracking"}
    importance = bench.found("importance", asked).mean(dim=0)
    torch.testing.assert_close(tables.importance[0], importance / importance.mean())
    losses = bench.found("pool", bench.training[:CHOICE_PROMPTS]).mean(dim=0)
    assert tables.pool.tolist() == pytest.approx([1 / BETAS[int(row.argmin())] for row in losses])
    shapes = tables.manifest.shapes
    sizes = Sizes(700, shapes.layers, shapes.query_heads, shapes.kv_heads)
    (line,) = CompilerKV(tables=str(compiled), budgets="onepass").shares(sizes, 64)[:1]
    torch.testing.assert_close(torch.tensor(line), 1 + tables.pool[0] * (tables.importance[0, 0] - 1))
