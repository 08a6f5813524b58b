"""`harness nightly` on the tiny model: the first night, an equal one, a planted regression, refusals, resuming."""

import json
import shutil
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.boards import nightly
from harness.cli.nightly import NEW_SERIES, nightly_options
from harness.engine.engine import Engine
from harness.engine.types import Outcome
from harness.machine import machine
from harness.records.spec import Sweep
from harness.run import sequential
from methods.registry import load_methods
from tasks import load_tasks
from tests.tiny_run import call

ROOT = Path(__file__).parents[2]
Captured = pytest.CaptureFixture[str]
BOARD = """
model = "tiny"
dtype = "float32"
device = "cpu"
methods = ["fullkv", "snapkv@kvcf"]
tasks = ["stdlib/next_line"]
budgets = ["32"]
lengths = [512]
limit = 6
max_new_tokens = 4
nll_tokens = 8

[board]
subject = "snapkv@kvcf"

[nightly]
version = 1
baseline = "published"
"""


night = partial(call, "nightly", "tiny.toml", "--out")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one night was published. Only read; see `folder`."""
    root = tmp_path_factory.mktemp("first")
    (root / "tiny.toml").write_text(BOARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert night("nights") == NEW_SERIES
    return root


@pytest.fixture
def folder(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the current folder."""
    shutil.copytree(first, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_first_night_becomes_the_baseline(first: Path) -> None:
    published = files(first / "published")
    about = json.loads(next(data for name, data in published.items() if name.endswith(".json")))
    assert (about["board"], about["version"], about["samples"]) == ("tiny", 1, 6)
    assert about["machine_class"].startswith("cpu, ") and ", float32, torch " in about["machine_class"]
    stem = only(first / "published", "*.json").stem
    ends = {
        ".md",
        ".csv",
        ".tasks.csv",
        ".summary.csv",
        ".rivals.csv",
        ".visible.csv",
        ".samples.csv",
        ".json",
        ".report.md",
    }
    assert set(published) == {stem + end for end in ends}
    assert published[f"{stem}.report.md"].startswith(
        b"# tiny: new series: compared with no night, this one becomes its baseline\n"
    )
    assert published[f"{stem}.samples.csv"].count(b"\n") == 1 + 6 * 2
    own = only(first / "nights", "*")
    assert files(own) == published and only(own, "*/run.json").parent.name == about["run_id"]


def test_an_equal_night_is_none_and_is_published(folder: Path, capsys: Captured) -> None:
    before = files(folder / "published")
    assert night("nights") == 0
    assert capsys.readouterr().out.startswith("tiny: no regression\n")
    after = files(folder / "published")
    assert len(list((folder / "nights").iterdir())) == 2
    same = [name for name in after if name.endswith(".samples.csv")]
    assert len(same) == 1 and after[same[0]] == before[same[0]]
    report = next(data.decode() for name, data in after.items() if name.endswith(".report.md"))
    assert "2 cells (method, budget, task)" in report and " 0 differ at all" in report


def test_a_planted_regression_ends_with_1_and_the_baseline_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    before, real = files(folder / "published"), Engine.run_group

    def run_group(self: Engine, *arguments: Any) -> list[list[Outcome]]:
        found = real(self, *arguments)
        for _, snapkv in found:
            snapkv.nll_per_token = tuple(value + 1 for value in snapkv.nll_per_token)
        return found

    monkeypatch.setattr(Engine, "run_group", run_group)
    assert night("nights") == 1
    said = capsys.readouterr()
    assert said.out.startswith("tiny: 2 regressions\n")
    assert "+1.000 [+1.000, +1.000]" in said.out and "snapkv@kvcf" in said.out
    last = said.err.splitlines()[-1]
    assert last.startswith("harness: 2 regressions; the published night stays") and "--accept" in last
    assert files(folder / "published") == before
    newest = sorted((folder / "nights").iterdir())[-1]
    assert "# tiny: 2 regressions\n" in only(newest, "*.report.md").read_text()
    assert night("nights", "--accept") == 0
    assert capsys.readouterr().out.startswith("tiny: 2 regressions, accepted\n")
    accepted = files(folder / "published")
    assert accepted.keys() == before.keys() and accepted != before
    assert night("nights") == 0


@pytest.mark.parametrize("changed", ["bfloat16", "EPYC"])
def test_another_dtype_or_processor_is_a_new_series_with_a_code_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, changed: str
) -> None:
    if changed == "EPYC":
        for module in (sequential, nightly):
            monkeypatch.setattr(module, "machine", lambda: {**machine(), "processor": "EPYC"})
    else:
        (folder / "tiny.toml").write_text(BOARD.replace("float32", changed))
    before = files(folder / "published")
    assert night("nights") == NEW_SERIES
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("harness: warning: new series: the last night was on cpu, ") and f", {changed}, " in line
    after = files(folder / "published")
    assert after.items() >= before.items() and len(after) == 2 * len(before)
    assert night("nights") == 0


def test_a_new_series_is_accepted_as_any_other_night(folder: Path) -> None:
    shutil.rmtree(folder / "published")
    assert night("nights", "--accept") == 0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[nightly]\nversion = 1\n", "[else]\n", "tiny.toml has no [nightly] table"),
        ("version = 1\n", "", "option nightly.version: Field required"),
        ("version = 1\n", "version = 1\nalhpa = 1\n", "option nightly.alhpa"),
        ("version = 1\n", "version = 1\nalpha = 1.5\n", "option nightly.alpha"),
        ("version = 1\n", "version = 1\nscore_points = nan\n", "option nightly.score_points"),
        ("version = 1\n", "version = 1\nnll_nats = -1\n", "option nightly.nll_nats"),
        ('baseline = "published"', "baseline = 5", "option nightly.baseline"),
        ('baseline = "published"', 'baseline = "tiny.toml"', "tiny.toml is no folder"),
        ("limit = 6", "limt = 6", "option limt"),
        ("snapkv@kvcf", "snapvk", "unknown method 'snapvk'"),
        ('subject = "', 'subject = "x', "is no method with a budget"),
    ],
)
def test_bad_boards_are_one_line_and_touch_nothing(
    folder: Path, capsys: Captured, old: str, new: str, says: str
) -> None:
    assert old in BOARD
    (folder / "tiny.toml").write_text(BOARD.replace(old, new))
    before = sorted(folder.rglob("*"))
    assert night("nights") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert line.startswith("harness: ") and says in line
    assert sorted(folder.rglob("*")) == before


def test_bad_words_and_a_damaged_baseline_are_one_line(folder: Path, capsys: Captured) -> None:
    only(folder / "published", "*.samples.csv").write_text("task\n")
    bad: list[tuple[Sequence[str], str]] = [
        (("absent.toml",), "cannot read 'absent.toml'"),
        (("tiny.toml", "--workers", "2"), "--workers is for runs on a Ray cluster; add --ray"),
        ((), "BOARD"),
        (("tiny.toml", "--out", "nights"), "is not the table that its .json was written with"),
    ]
    for words, says in bad:
        assert call("nightly", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert len(list((folder / "nights").iterdir())) == 1


def test_an_interrupted_night_is_gone_on_with_by_the_same_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for module in (sequential, nightly):
        monkeypatch.setattr(module, "git_commit", lambda: "c0ffee")
    real, calls = Engine.run_group, []

    def run_group(self: Engine, *arguments: Any) -> list[list[Outcome]]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Engine, "run_group", run_group)
    assert night("fresh") == 130 and night("fresh") == 0
    assert "going on with the unfinished night" in capsys.readouterr().err
    assert len(calls) == 6 + 1
    assert len(only(folder / "fresh", "*/*/records.jsonl").read_text().splitlines()) == 6 * 2
    calls.clear()
    assert night("other") == 130
    monkeypatch.setattr(nightly, "git_commit", lambda: "another")
    assert night("other") == 0
    assert len(list((folder / "other").iterdir())) == 2


def test_the_packaged_board_is_one() -> None:
    path = ROOT / "leaderboards" / "boards" / "nightly.toml"
    table = tomllib.loads(path.read_text())
    options = nightly_options(table.pop("nightly"), path.name)
    sweep = Sweep.model_validate(table)
    assert options.version == 1 and not Path(options.baseline).is_absolute()
    assert set(sweep.tasks) <= set(load_tasks()) and set(sweep.methods) <= set(load_methods())


def test_the_workflow_runs_it_and_may_push_nothing() -> None:
    text = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    workflow = yaml.safe_load(text)
    asked = workflow[True]  # YAML 1.1 reads `on` as a truth value
    assert set(asked) == {"schedule", "workflow_dispatch"}
    assert set(asked["workflow_dispatch"]["inputs"]) == {"runner", "ray", "board", "accept"}
    assert workflow["permissions"] == {"contents": "read"} and "git push" not in text
    (job,) = workflow["jobs"].values()
    steps = " ".join(step.get("run", "") for step in job["steps"])
    assert f'"$code" -eq {NEW_SERIES} ]' in steps
    assert "harness nightly" in steps and "${{" not in steps  # inputs reach the shell as variables, never as code
    assert asked["workflow_dispatch"]["inputs"]["board"]["default"] in job["steps"][5]["env"]["BOARD"]
    order = [step.get("uses", "").partition("@")[0] for step in job["steps"]]
    assert order.index("actions/upload-artifact") < order.index("actions/cache/save")
    assert "if" not in job["steps"][-1]  # a night that regressed is not what the next one is compared with
