"""The plugin on the packaged model beside lm-eval's `hf`: a needle at 1k tokens and the example's questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.lm_eval_plugin import KVPolicyLM
from harness.models import LoadedModel, load_model

pytestmark = pytest.mark.model
pytest.importorskip("wonderwords")
pytest.importorskip("nltk")
ROOT = Path(__file__).resolve().parent.parent


def test_fullkv_is_hf(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)  # the example names its rows from there
    own = load_model("smollm2-135m", dtype="float32", device="cpu")
    theirs = HFLM(pretrained=own.model, tokenizer=own.tokenizer, batch_size=1, max_length=own.context)
    ours = KVPolicyLM(pretrained=smollm2)
    metadata = {"tokenizer": ours.tokenizer_folder, "max_seq_lengths": [1024]}
    tasks = TaskManager(metadata=metadata).load(["niah_single_1", "examples/lm_eval/kv_choices.yaml"])["tasks"]
    needle, choices = (_requests(task) for task in tasks.values())
    assert ours.generate_until(needle, disable_tqdm=True) == theirs.generate_until(needle, disable_tqdm=True)
    mine, other = (lm.loglikelihood(choices, disable_tqdm=True) for lm in (ours, theirs))
    assert [x for x, _ in mine] == pytest.approx([x for x, _ in other], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]


def _requests(task: Any) -> list[Any]:
    task.build_all_requests(limit=1)
    return list(task.instances)
