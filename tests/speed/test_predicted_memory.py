"""Predicted memory: its cache parts are the measured live bytes, and more work never takes less."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from harness.engine.decode import Decoding
from harness.engine.kernels import causal_attention, column_sums
from harness.engine.packed import live_bytes
from harness.engine.prefill import PrefillLayer
from harness.engine.transformers_seam import AttachedModel
from harness.records.measured import ProbeSpec
from harness.speed import predicted_memory
from harness.speed.dims import Dims
from harness.speed.one_method import Isolated
from harness.speed.predicted_memory import ProbeShape
from methods.base import Needs
from methods.registry import load_methods, make_policy
from methods.views import Form
from tests.speed.conftest import ids

TOKENS, BUDGET, NEW = 90, 20, 6


def work(label: str, **changed: object) -> ProbeShape:
    policy = make_policy(label)
    slots = BUDGET if policy.budgeted else TOKENS
    plain = ProbeShape(policy.needs, True, not policy.budgeted, TOKENS, slots, batch=1, new_tokens=NEW, chunk=None)
    return replace(plain, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", ["fullkv", "snapkv", "h2o", "random"])
def test_the_kept_part_is_what_lives(model: AttachedModel, label: str) -> None:
    policy = make_policy(label)
    kvs = Isolated(model, policy, BUDGET if policy.budgeted else None).prefill(ids()).kvs
    dims = Dims.of(model.config, 4)
    assert predicted_memory.kept(dims, work(label)) == sum(live_bytes(kv, TOKENS) for kv in kvs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("label", ["fullkv", "snapkv"])
def test_the_rows_part_is_what_a_batch_allocates(model: AttachedModel, label: str, batch: int) -> None:
    policy = make_policy(label)
    runner = Isolated(model, policy, BUDGET if policy.budgeted else None)
    prompts = [runner.prefill(ids()) for _ in range(batch)]
    session = Decoding.of(model, prompts, room=NEW - 1, release=True)
    for _ in range(NEW - 1):
        session.step([7] * batch)
    held = sum(map(session.stored_bytes, range(batch)))
    assert predicted_memory.rows(Dims.of(model.config, 4), work(label, batch=batch)) == held


def test_what_is_observed_is_what_a_layer_holds(model: AttachedModel) -> None:
    layer = PrefillLayer(Needs(window=8, column_sums=True), TOKENS)
    layers = [layer, *(PrefillLayer(Needs(), TOKENS) for _ in range(model.layers - 1))]
    model.forward(torch.tensor([ids()]), layers, position=0, keep=1)
    assert layer.sums is not None
    both = work("snapkv", needs=Needs(window=8, column_sums=True))
    assert predicted_memory.observed(Dims.of(model.config, 4), both) == layer.queries.nbytes + layer.sums.nbytes
    assert predicted_memory.full_layer(Dims.of(model.config, 4), both) == layer.keys.nbytes + layer.values.nbytes


@pytest.mark.parametrize("label", [name for name in load_methods() if name not in ("compilerkv", "q8_0")])
@pytest.mark.parametrize("chunk", [None, 32])
def test_more_work_never_takes_less(model: AttachedModel, label: str, chunk: int | None) -> None:
    def bytes_of(**changed: int) -> int:
        return predicted(model, label, **{"tokens": 200, "batch": 2, "new_tokens": 8, "chunk": chunk, **changed})

    least = bytes_of()
    assert bytes_of(tokens=400) > least
    assert bytes_of(budget=40) >= least
    assert bytes_of(batch=3) > least
    assert bytes_of(batch=64, new_tokens=800) > bytes_of(batch=64)
    assert bytes_of(number=2) < least


def predicted(model: AttachedModel, label: str, budget: int = BUDGET, number: int = 4, **shape: int | None) -> int:
    policy, spec = make_policy(label), ProbeSpec(method=label, budget=None, **shape)
    return predicted_memory.predict(model.config, number, policy, spec, budget if policy.budgeted else None)


def test_what_saves_memory(model: AttachedModel) -> None:
    full, small = (predicted(model, label, 64, tokens=4000, batch=4) for label in ("fullkv", "snapkv"))
    chunked = predicted(model, "snapkv", 64, tokens=4000, batch=4, chunk=128)
    assert small < full / 2
    dims = Dims.of(model.config, 4)
    assert chunked >= 4 * 4000 * dims.slot  # in chunks, every layer is whole until the last chunk
    cut, whole = (predicted_memory.activations(dims, work("snapkv", tokens=4000, chunk=n)) for n in (128, None))
    assert cut < whole


def test_shapes_by_hand() -> None:
    """Two layers, one of them sliding over 10 tokens: 2 KV heads of 8 numbers of 2 bytes."""
    dims = Dims((None, 10), heads=4, kv_heads=2, head_dim=8, hidden=32, intermediate=64, vocab=100, number=2)
    own = work("snapkv", tokens=50, slots=20, new_tokens=6)
    assert dims.slot == 2 * 2 * 8 * 2 == 64
    assert predicted_memory.kept_layer(dims, own) == 20 * (64 + 2 * 4)
    assert predicted_memory.kept(dims, own) == 20 * (64 + 2 * 4) + 10 * 64
    assert predicted_memory.rows(dims, own) == (20 + 10 + 2 * 5) * 64 + 20 * 2 * 4
    assert predicted_memory.logits(dims, own) == 100 * (2 + 4)


def test_a_gpu_of_llama_3_8b_at_32k_by_hand() -> None:
    """In bfloat16: a cache of 128 KiB a token, and above it one layer's MLP; column sums are next to nothing."""
    heads = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = SimpleNamespace(**heads, hidden_size=4096, intermediate_size=14336, vocab_size=128256)
    tokens, dims = 32768, Dims.of(config, 2)
    cache, layer = tokens * 128 * 1024, tokens * 4096
    mlp = tokens * (4 * 4096 + 3 * 14336) * 2 + tokens * 2 * 128 * 2

    def gpu(label: str, batch: int = 1, chunk: int | None = None) -> int:
        policy, spec = (
            make_policy(label),
            ProbeSpec(method=label, budget="512", tokens=tokens, batch=batch, chunk=chunk),
        )
        return predicted_memory.predict(config, 2, policy, spec, 512 if policy.budgeted else None, cuda=True)

    assert cache == 4_294_967_296 and gpu("fullkv") == cache + mlp
    room, index = 32 * 31 * 4096, tokens * 8 * 4 * 8
    assert gpu("fullkv", 15) == 15 * (cache + room + 2 * layer + index + 128256 * 4)  # the batch is made
    kept = 512 * 8 * (2 * 128 * 2 + 4)  # of a layer, with positions
    assert gpu("snapkv") == gpu("h2o") == 31 * kept + layer + mlp
    assert gpu("snapkv", 16) - gpu("snapkv") == 15 * (32 * kept + 128256 * 4)
    assert gpu("snapkv", chunk=2048) < gpu("snapkv") + cache - layer
    shape = work("h2o", tokens=tokens, slots=512, cuda=True, one_buffer=True)
    assert predicted_memory.column_sums(dims, shape) == 32 * tokens * 4
    assert predicted_memory.attention(dims, shape) < mlp / 2
    assert predicted_memory.moved(dims, shape) == 512 * 8 * (512 + 32)


@pytest.mark.parametrize("number", [2, 4])
def test_column_sums_cost_no_more_than_a_layers_mlp(number: int) -> None:
    """SmolLM2-135M's shapes: what is observed on the way is below what the layer takes anyway, at any length."""
    shapes = {"heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "intermediate": 1536, "vocab": 49152}
    dims = Dims((None,) * 30, **shapes, number=number)
    for tokens in (512, 2048, 8192, 32768):
        needs = (Needs(window=8, column_sums=sums) for sums in (False, True))
        plain, summed = (predicted_memory.activations(dims, work("snapkv", tokens=tokens, needs=own)) for own in needs)
        assert plain == summed


@pytest.mark.parametrize("chunk", [None, 24])
def test_column_sums_are_the_tensors_that_are_made(chunk: int | None) -> None:
    """Every tensor of the function alive at once, as PyTorch's own profiler of memory sees it, kernel buffers apart."""
    tokens, new = 192, chunk or 192
    dims = Dims((None,), heads=6, kv_heads=2, head_dim=32, hidden=192, intermediate=384, vocab=100, number=4)
    drawn = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 6, new, 32, generator=drawn)
    keys, values = (torch.randn(1, 2, tokens, 32, generator=drawn) for _ in range(2))
    lse = causal_attention(queries, keys, values, Form(0.2))[1]
    assert lse is not None
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        column_sums(queries, keys, lse, Form(0.2))
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    expected = predicted_memory.column_sums(dims, work("h2o", tokens=tokens, chunk=chunk))
    assert most == pytest.approx(expected, rel=0.1)
