"""RULER prompts of 32,768 tokens: this harness against lm-eval's generators of the same task, length and tokenizer.

Both sides search their haystack's size, draw and count tokens, one process, one thread. lm-eval's docs are left as
plain dicts, which saves it their conversion. Its niah_multikey_3 and cwe are shorter than asked for (coarse steps, the
worked example left out), which is in its favour. `KVH_BENCH_SAMPLES` sets the samples of a
task; 500 are the official number.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from harness.models.assets import asset_folder
from harness.models.load import load_model
from harness.models.prompt import TaskTokenizer
from tasks import load_tasks
from tasks.base import Sample, TaskOptions

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not (find_spec("lm_eval") and find_spec("nltk")), reason="lm_eval[ruler] is not installed"),
]
LENGTH = int(os.environ.get("KVH_BENCH_LENGTH", "32768"))
SAMPLES = int(os.environ.get("KVH_BENCH_SAMPLES", "500"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The packaged model's. What both sides import is imported here, outside of their time."""
    if not asset_folder("smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not in the cache; run `harness fetch smollm2-135m`")
    for module in ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils"):
        import_module(f"lm_eval.tasks.ruler.{module}")
    load_tasks()
    return load_model("smollm2-135m", dtype="float32", device="cpu").tokenizer


NEEDLES = {
    "niah_single_1": ("repeat", "words", "numbers"),
    "niah_multikey_2": ("needle", "words", "numbers"),
    "niah_multikey_3": ("needle", "uuids", "uuids"),
}


def theirs(name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The task's docs by lm-eval."""
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

    size: dict[str, Any] = {"max_seq_length": LENGTH, "num_samples": SAMPLES}
    if name in NEEDLES:
        kinds = dict(zip(("type_haystack", "type_needle_k", "type_needle_v"), NEEDLES[name], strict=True))
        hay = prepare_niah.get_haystack(NEEDLES[name][0])
        return prepare_niah.generate_samples(hay, template=niah_utils.TEMPLATE, TOKENIZER=tokenizer, **kinds, **size)
    chains = vt_utils.sys_vartrack_w_noise_random
    if name == "vt":
        size["icl_example"] = chains(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    generate = {"vt": chains, "cwe": cwe_utils.sys_word_pair_random, "fwe": fwe_utils.sys_kwext}[name]
    return generate(tokenizer=tokenizer, **size)


@pytest.mark.parametrize("name", [*NEEDLES, "vt", "cwe", "fwe"])
def test_generation(race: Callable[..., Any], tokenizer: Any, name: str) -> None:
    task = load_tasks()[f"ruler/{name}"]
    options = TaskOptions(tokenizer=TaskTokenizer(tokenizer), max_tokens=LENGTH, lengths=(LENGTH,), limit=SAMPLES)

    def ours() -> list[Sample]:
        return list(task.samples(options))

    label = f"{name}, {LENGTH} tokens x {SAMPLES}: ours / lm-eval"
    rounds = 3 if SAMPLES < 100 else 1
    samples, docs = race(label, ours, lambda: theirs(name, tokenizer), goal=("<=", 1.0), rounds=rounds)
    assert len(samples) == len(docs) == SAMPLES
    sizes = [sample.meta["prompt_tokens"] + sample.max_new_tokens for sample in samples]
    assert max(sizes) <= LENGTH
    assert sum(sizes) > 0.9 * LENGTH * SAMPLES  # ours are not faster by being shorter
