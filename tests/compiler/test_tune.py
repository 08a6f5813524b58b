"""`harness tune`: the sets that are tried, what is chosen and stored, and `NAME@tuned` made from it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.compiler.asked import TRIALS, TuneSpec
from harness.compiler.rollouts import Rollout
from harness.compiler.tune import Tuner, parameter_sets, parameter_space
from harness.errors import HarnessError
from harness.models.prompt import token_sha256
from harness.plan.methods import plan_method
from harness.records.run_folder import find_runs, load_run
from methods.base import PolicyError
from methods.registry import load_methods, make_policy
from methods.tuned.artefact import CHOSEN, load_tuning
from tests.methods.compiled import kept, prompt
from tests.tiny_run import FAST

TUNABLE = sorted(name for name, method in load_methods().items() if method.choices)
SMALL = {"prompts": 20, "lengths": (600, 800), "answer": 3, "budgets": (64, 512), "trials": 5}


def spec(corpus: Path, *methods: str, **changes: Any) -> TuneSpec:
    fixed = {"model": "tiny", "dtype": "float32", "device": "cpu", "corpora": (str(corpus),), "methods": methods}
    return TuneSpec.model_validate({**fixed, **SMALL, **changes})


@pytest.fixture(scope="module")
def tuned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    tuner = Tuner(spec(corpus, "snapkv", "headkv"), folder)
    for name in tuner.methods:
        tuner.tune(name, ("harness", "tune"))
    return folder


@pytest.mark.parametrize("name", TUNABLE)
def test_every_method_is_tried_as_often_as_compilerkvs_form_its_authors_values_among_them(name: str) -> None:
    method = load_methods()[name]
    sets = parameter_sets(method, TRIALS, seed=0)
    assert len(sets) == TRIALS == len({json.dumps(own) for own in sets})
    assert make_policy(name, sets[0]) == make_policy(name)
    spaces = parameter_space(method)
    assert all(own in spaces for own in sets)  # none is refused, none does what another one does
    assert all(own[key] in method.choices[key] for own in sets for key in own)
    presets = method.presets.keys() & {"paper", "block", "engine"} or {"kvpress"} & method.presets.keys()
    authors = make_policy("@".join([name, *presets]))
    if not authors.evicts_while_decoding:
        assert authors in [make_policy(name, own) for own in sets]
    assert parameter_sets(method, TRIALS, seed=0) == sets != parameter_sets(method, TRIALS, seed=1)


def test_the_set_with_the_least_divergence_is_chosen(tuned: Path, corpus: Path) -> None:
    tuning, _ = load_tuning(tuned / "snapkv.json")
    assert len(tuning.trials) == 5 and tuning.budgets == (64,)  # 512 tells nothing apart in 600 tokens
    best = min(tuning.trials, key=lambda trial: trial.score)
    assert tuning.chosen == best.parameters and all(trial.divergence[0] > 0 for trial in tuning.trials)
    assert tuning.trials[0].parameters == {key: getattr(make_policy("snapkv"), key) for key in tuning.choices}
    bench = Tuner(spec(corpus, "snapkv"), tuned).bench
    assert set(tuning.prompts) == {token_sha256(bench.prompts[at].ids) for at in bench.training}
    alone = bench.divergences(bench.training[0], [make_policy("snapkv", best.parameters)], 64)
    stored = bench.found("snapkv", bench.training[:1])[0, 0]
    assert alone[0] == pytest.approx(float(stored[tuning.trials.index(best)]), rel=1e-4)


def test_a_tuning_that_is_repeated_runs_no_trial_again(
    tuned: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_tuning(tuned / "headkv.json")[0]
    monkeypatch.delattr(Rollout, "logprobs")
    again, _ = Tuner(spec(corpus, "headkv"), tuned).tune("headkv", ("harness", "tune"))
    assert again.trials == before.trials and again.chosen == before.chosen


def test_a_tuned_method_is_the_method_with_what_was_chosen(tuned: Path) -> None:
    tuning, sha256 = load_tuning(tuned / "snapkv.json")
    planned = plan_method("snapkv@tuned", {"artefact": str(tuned)}, revision=tuning.model_revision)
    plain, view = make_policy("snapkv", tuning.chosen), prompt(90)
    assert kept(planned.policy, view, 40) == kept(plain, view, 40)
    assert planned.policy.needs == plain.needs and planned.policy.fitted_on() == set(tuning.prompts)
    assert planned.spec.params["artefact_sha256"] == sha256 and planned.spec.params["inner"]["recent"] == plain.recent
    with pytest.raises(HarnessError, match=r"is of snapkv on tiny .* not of snapkv on this model \(other\)"):
        plan_method("snapkv@tuned", {"artefact": str(tuned)}, revision="other")
    with pytest.raises(PolicyError, match="depends on the model"):
        make_policy("snapkv@tuned").compress(view, 40)


def test_a_run_stands_tuned_and_plain_side_by_side_but_not_on_the_tunings_own_prompts(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", *FAST, "--methods", "snapkv,snapkv@tuned", "--budgets", "64", "--limit", "2", "--out", str(tmp_path)]
    assert main([*run, "--set", f"snapkv.artefact={tuned}"]) == 0
    _, records = load_run(find_runs(tmp_path)[0])
    assert {record.method for record in records} == {"snapkv", f"snapkv@tuned[artefact={tuned}]"}
    taken = tmp_path / "taken"
    taken.mkdir()
    tuning = json.loads((tuned / "snapkv.json").read_text())
    (taken / "snapkv.json").write_text(json.dumps({**tuning, "prompts": [records[0].prompt_sha256]}))
    assert main([*run, "--set", f"snapkv.artefact={taken}"]) == 2
    assert "was fitted on sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["streamingllm"], "streamingllm states no choices, so there is nothing to tune; methods that do: "),
        (["snapvk"], "unknown method 'snapvk'; did you mean 'snapkv'?"),
        (["snapkv", "--trials", "1"], "--trials 1 is too small; give at least 2"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments, "--model", "tiny", "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "changed", "says"),
    [
        ("snapkv@tuned", {}, "nothing was tuned for this model .*harness tune snapkv --out DIR"),
        ("snapkv@tuned", {"artefact": "nowhere"}, "no tuned parameters at 'nowhere'"),
        ("snapkv@tuned", {"recent": 8}, "snapkv@tuned has no parameter 'recent'"),
        ("streamingllm@tuned", {}, "unknown preset 'tuned' of streamingllm"),
    ],
)
def test_a_tuned_method_that_cannot_be_made_is_refused(label: str, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(HarnessError, match=says):
        plan_method(label, changed, revision="other")


@pytest.mark.parametrize("flaw", ["{}", "no json", json.dumps({"schema_version": 1, "method": 3})])
def test_a_damaged_artefact_is_refused_in_a_line(flaw: str, tmp_path: Path) -> None:
    (tmp_path / "snapkv.json").write_text(flaw)
    with pytest.raises(HarnessError, match="snapkv.json' is damaged: .*tune the method again"):
        plan_method("snapkv@tuned", {"artefact": str(tmp_path)}, revision="other")


@pytest.mark.parametrize("path", sorted(CHOSEN.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_packaged_artefact_is_of_as_many_trials_and_still_what_the_method_offers(path: Path) -> None:
    tuning, _ = load_tuning(path)
    assert tuning.method == path.stem and len(tuning.trials) == TRIALS
    assert tuning.choices == {key: tuple(own) for key, own in load_methods()[path.stem].choices.items()}
    assert tuning.chosen == min(tuning.trials, key=lambda trial: trial.score).parameters
    assert [t.parameters for t in tuning.trials] == parameter_sets(load_methods()[path.stem], TRIALS, tuning.seed)
    policy = make_policy(f"{path.stem}@tuned").for_model(tuning.model_revision)
    assert policy.fitted_on() >= set(tuning.prompts)
    assert asdict(policy)["inner"].items() >= tuning.chosen.items()
