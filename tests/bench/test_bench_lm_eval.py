"""lm-eval through the plugin: `method=fullkv` beside lm-eval's `hf`, and four choices of a question beside one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.lm_eval.plugin import KVPolicyLM

pytestmark = pytest.mark.bench
pytest.importorskip("wonderwords")
pytest.importorskip("nltk")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"
ROUNDS = 3


@pytest.fixture(scope="module")
def models() -> tuple[KVPolicyLM, Any]:
    """Ours and lm-eval's, each with its own copy of the packaged model; skips when it was never fetched."""
    from lm_eval.models.huggingface import HFLM

    from harness.lm_eval.plugin import KVPolicyLM
    from harness.models.assets import asset_folder
    from harness.models.load import load_model

    if not asset_folder("smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not in the cache; run `harness fetch smollm2-135m`")
    own = load_model("smollm2-135m", dtype="float32")
    theirs = HFLM(pretrained=own.model, tokenizer=own.tokenizer, batch_size=1, max_length=own.context)
    return KVPolicyLM(pretrained="smollm2-135m", dtype="float32"), theirs


def _requests(lm: KVPolicyLM, task: str, count: int) -> list[Any]:
    """Requests of a task's first `count` samples, built once: only answering them is timed."""
    from lm_eval.tasks import TaskManager

    metadata = {"tokenizer": lm.tokenizer_folder, "max_seq_lengths": [1024]}
    found = TaskManager(metadata=metadata).load([task])["tasks"]
    (loaded,) = found.values()
    loaded.build_all_requests(limit=count)
    return list(loaded.instances)


def test_niah_single_1_beside_hf(race: Callable[..., tuple[Any, Any]], models: tuple[KVPolicyLM, Any]) -> None:
    ours, theirs = models
    requests = _requests(ours, "niah_single_1", 1)
    mine, other = race(
        "lm-eval niah_single_1 at 1k, float32: kvpolicy,fullkv / hf",
        lambda: ours.generate_until(requests, disable_tqdm=True),
        lambda: theirs.generate_until(requests, disable_tqdm=True),
        goal=("<=", 1.05),
        rounds=ROUNDS,
    )
    assert mine == other


def test_four_choices_beside_one(
    race: Callable[..., tuple[Any, Any]], models: tuple[KVPolicyLM, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])  # the task names its rows from there
    ours, _ = models
    requests = _requests(ours, str(EXAMPLE / "kv_choices.yaml"), 1)
    before = ours.answers.engine.prefills
    four, one = race(
        "lm-eval, a question's four choices / its first alone",
        lambda: ours.loglikelihood(requests, disable_tqdm=True),
        lambda: ours.loglikelihood(requests[:1], disable_tqdm=True),
        goal=("<=", 2.0),
        rounds=ROUNDS,
    )
    assert (len(four), four[0][0]) == (4, pytest.approx(one[0][0], abs=1e-4))
    assert ours.answers.engine.prefills - before == 2 * ROUNDS  # one for each turn of each side
