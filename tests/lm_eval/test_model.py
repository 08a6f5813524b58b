"""The plugin on the packaged model beside lm-eval's `hf`: a needle, and the example's questions."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from harness.lm_eval.plugin import KVPolicyLM
from harness.models.load import LoadedModel, load_model

pytestmark = pytest.mark.model
ROOT = Path(__file__).resolve().parents[2]
RULER = Path(lm_eval.__file__).parent / "tasks" / "ruler"


@pytest.fixture(scope="module")
def loaded(smollm2: LoadedModel) -> LoadedModel:
    """Of this module alone: the plugin replaces a model's attention. Skips as `smollm2` does."""
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def full(loaded: LoadedModel) -> KVPolicyLM:
    return KVPolicyLM(pretrained=loaded)


@pytest.fixture(scope="module")
def hf(smollm2: LoadedModel) -> HFLM:
    return HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=1, max_length=smollm2.context)


@pytest.fixture(scope="module")
def questions() -> list[Any]:
    """Four of the example, with four choices each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the example names its rows from there
        return _requests(TaskManager(include_defaults=False), "examples/lm_eval/kv_choices.yaml", 4)


def test_a_generation_is_that_of_hf(full: KVPolicyLM, hf: HFLM) -> None:
    pytest.importorskip("nltk")
    metadata = {"tokenizer": full.tokenizer_folder, "max_seq_lengths": [512]}
    known = TaskManager(include_path=RULER, include_defaults=False, metadata=metadata)
    requests = _requests(known, "niah_single_1", 1)
    texts = full.generate_until(requests, disable_tqdm=True)
    assert texts == hf.generate_until(requests, disable_tqdm=True)
    assert requests[0].doc["outputs"][0] in texts[0]


def test_log_probabilities_are_those_of_hf(full: KVPolicyLM, hf: HFLM, questions: list[Any]) -> None:
    mine, other = (lm.loglikelihood(questions[:4], disable_tqdm=True) for lm in (full, hf))
    assert [x for x, _ in mine] == pytest.approx([x for x, _ in other], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]


def test_the_names_are_lost_with_their_half_of_the_cache(
    loaded: LoadedModel, full: KVPolicyLM, questions: list[Any]
) -> None:
    half = KVPolicyLM(pretrained=loaded, method="streamingllm", budget=0.5)
    assert _right(full, questions) == 4
    assert _right(half, questions) <= 1  # a guess


def _right(lm: KVPolicyLM, requests: list[Any]) -> int:
    scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    labels = [request.doc["label"] for request in requests[::4]]
    found = [max(range(4), key=lambda i, at=at: scores[4 * at + i]) for at in range(len(labels))]  # type: ignore[misc]
    return sum(map(int.__eq__, found, labels))


def _requests(known: TaskManager, name: str, samples: int) -> list[Any]:
    (task,) = known.load([name])["tasks"].values()
    task.build_all_requests(limit=samples)
    return list(task.instances)
