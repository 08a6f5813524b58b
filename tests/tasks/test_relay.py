"""Tasks of `relay`: the samples, scores and data of the tasks they name, asked of another process."""

from pathlib import Path

import pytest

from tasks import load_tasks
from tasks.base import TASKS, TaskError, find_tasks
from tasks.pool import LANES
from tasks.relay import RELAYED
from tests.task_data import Options, digest

load_tasks()


@pytest.mark.parametrize("name", [name for name in RELAYED if name != "qa/longbench"])
def test_a_relayed_task_has_the_samples_of_the_one_it_names(name: str, options: Options) -> None:
    own, source = TASKS[f"relay/{name}"], TASKS[RELAYED[name]]
    asked = options(lengths=(1024,), limit=6)
    samples = list(own.samples(asked))
    assert samples == list(source.samples(asked)) and len(samples) == 6 and digest(samples)
    assert own.score(samples[0], samples[0].answers[0]) == source.score(samples[0], samples[0].answers[0])
    assert own.score(samples[0], samples[0].answers[0])["score"] == 1
    assert own.provenance(asked) == {**source.provenance(asked), "prompts": f"those of {source.name}"}
    assert (own.query, own.relayed, source.relayed) == ("agnostic", True, False)


def test_the_family_needs_no_data_and_no_lane_of_its_own() -> None:
    assert [task.name for task in find_tasks(["relay"])] == ["relay/needle", "relay/keys"]
    assert {RELAYED["needle"], RELAYED["keys"]} <= set(LANES) and not any(name.startswith("relay") for name in LANES)
    assert len(find_tasks(["relay/qa"])) == 3


def test_missing_data_is_refused_by_the_relayed_task_too(options: Options, tmp_path: Path) -> None:
    for method in ("find_data", "read_data"):
        with pytest.raises(TaskError, match="harness data fetch"):
            getattr(TASKS["relay/qa/squad"], method)(options(data_dir=tmp_path))
