"""Models that mix attention with other layers, tiny and random: full layers are compressed, the others left alone."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from harness.compiler.rollouts import Rollout
from harness.engine.again import compress_again, note
from harness.engine.compress import Compressed, compress
from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.prefill import prefill
from harness.engine.states import States
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, NextTurn, Outcome, Prompt, PromptFailed
from harness.errors import HarnessError
from harness.generate.attached import attached
from harness.speed.dims import check_layers
from methods.base import Budget, KVPolicy, Needs
from methods.fullkv import FullKV
from methods.h2o import H2O
from methods.snapkv import SnapKV
from methods.streamingllm import StreamingLLM
from tests.engine.test_transformers_seam import HEADS, NEW, SLOT, build, prompt

CHUNK, TOKENS, BUDGET = 8, 30, 9
EVERY_SECOND = {"layer_types": ["linear_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "num_local_experts": 2}
DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 16, **EVERY_SECOND, **EXPERTS},
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}
NEMOTRON = {
    **{"layers_block_type": ["mamba", "attention", "moe", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8},
    **{"ssm_state_size": 8, "n_groups": 1, "conv_kernel": 4, "chunk_size": 8, "n_routed_experts": 2},
    **{"num_experts_per_tok": 1, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
}
LFM = {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48, "block_auto_adjust_ff_dim": False}
LLAMA4 = {
    **{"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "no_rope_layer_interval": 2},
    **{"floor_scale": 4, "attn_scale": 0.5, "attention_chunk_size": CHUNK},  # attention that sharpens with position
}

# type, changed sizes, layers that policies see, layers of chunks
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "qwen3-next": ("qwen3_next", DELTA, 2, 0),
    "jamba": ("jamba", {**MAMBA, **JAMBA, **EXPERTS}, 2, 0),
    "bamba": ("bamba", {**MAMBA2, "attn_layer_indices": [1, 3]}, 2, 0),
    "falcon-h1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 64, "num_hidden_layers": 2}, 2, 0),  # both in every layer
    "nemotron-h": ("nemotron_h", NEMOTRON, 2, 0),  # and a layer that keeps nothing
    "lfm2": ("lfm2", {**LFM, "conv_L_cache": 3}, 2, 0),
    "llama4": ("llama4_text", LLAMA4, 2, 2),
    "llama4-one-chunk": ("llama4_text", {**LLAMA4, "attention_chunk_size": 256}, 4, 0),
}
every_model = pytest.mark.parametrize("name", MODELS)
CELLS = [
    *(Cell(policy, Budget(tokens=BUDGET)) for policy in (SnapKV(recent=3), StreamingLLM(), H2O())),
    Cell(StreamingLLM(evict=True), Budget(tokens=BUDGET)),
    Cell(FullKV(), None),
]


@cache
def pair(name: str) -> tuple[Any, AttachedModel]:
    """The same model twice: as transformers runs it, and attached."""
    model = build(*MODELS[name][:2])
    return model, AttachedModel(copy.deepcopy(model))


def run(model: AttachedModel, asked: Prompt, *cells: Cell, **options: Any) -> list[Outcome]:
    outcomes = Engine(model, **options).run(asked, cells)
    assert [outcome.error for outcome in outcomes] == [None] * len(cells)
    return outcomes


def answer_of(plain: Any, ids: list[int], tokens: int = NEW) -> list[int]:
    out = plain.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    said: list[int] = out[0, len(ids) :].tolist()
    return said


def left_of(model: AttachedModel, ids: list[int], policy: KVPolicy, budget: int) -> Compressed:
    with torch.inference_mode():
        return compress(prefill(model, ids, policy.needs), policy, budget)


@every_model
def test_the_uncompressed_engine_is_the_plain_model(name: str) -> None:
    plain, model = pair(name)
    for tokens in (1, TOKENS):
        asked = prompt(tokens, answer=(5, 6, 7))
        gold = answer_of(plain, [*asked.ids])
        with torch.no_grad():
            logprobs = plain(torch.tensor([[*asked.ids, *asked.answer]])).logits[0].log_softmax(-1)
        nll = [-logprobs[tokens - 1 + i, token].item() for i, token in enumerate(asked.answer)]
        for query in ("aware", "agnostic") if asked.context else ("aware",):
            (outcome,) = run(model, asked, CELLS[-1], query=query)
            assert list(outcome.token_ids) == gold
            assert outcome.nll_per_token == pytest.approx(nll, abs=5e-4)
    assert len(set(gold)) > 1


@every_model
def test_full_layers_are_compressed_and_the_others_counted_as_they_are(name: str) -> None:
    _, _, seen, chunked = MODELS[name]
    plain, model = pair(name)
    cache = DynamicCache(config=plain.config)
    with torch.no_grad():
        plain(torch.tensor([prompt(TOKENS).ids]), past_key_values=cache)
    sides = [getattr(layer, side, {}) for layer in cache.layers for side in ("conv_states", "recurrent_states")]
    states = sum(x.nbytes for side in sides for x in side.values() if x is not None)
    assert (states > 0) == model.mixed
    apart = states + chunked * (TOKENS % CHUNK) * HEADS * SLOT
    *some, evicting, whole = run(model, prompt(TOKENS), *CELLS)
    assert whole.kv_bytes == whole.full_bytes == whole.stored_bytes == seen * TOKENS * HEADS * SLOT + apart
    for outcome in (*some, evicting):
        assert outcome.kept_slots == (BUDGET * HEADS,) * seen
        assert outcome.kv_bytes == outcome.asked_bytes == seen * BUDGET * HEADS * (SLOT + 4) + apart
        assert (outcome.full_bytes, outcome.state_bytes) == (whole.full_bytes, states)
    last = (TOKENS + NEW - 2) % CHUNK + 1  # of the chunk that the last token that was fed is in
    ends = states + chunked * last * HEADS * SLOT
    assert evicting.kv_bytes_end == seen * BUDGET * HEADS * (SLOT + 4) + ends
    grown = (TOKENS % CHUNK - 1 + NEW) if chunked else 0
    assert grown == 0 or last < grown  # a chunk ended on the way


@every_model
def test_a_cell_says_the_same_alone_and_in_company(name: str) -> None:
    model, asked, cells = pair(name)[1], prompt(TOKENS, answer=(5, 6, 7)), [CELLS[0], CELLS[-1]]
    for together, cell in zip(run(model, asked, *cells), cells, strict=True):
        (alone,) = run(model, asked, cell)
        assert together.token_ids == alone.token_ids
        assert together.nll_per_token == pytest.approx(alone.nll_per_token, abs=1e-4)
        assert together.byte_steps == alone.byte_steps


@every_model
def test_tokens_may_come_in_pieces(name: str) -> None:
    """Of a prompt, but in Jamba's layers, and of a turn, which goes on over what there is."""
    plain, model = pair(name)
    asked, more = prompt(TOKENS).ids, [11, 12, 13, 14, 15]
    if model.stepwise:
        with pytest.raises(HarnessError, match="as a whole, not 7 tokens by 7; leave --chunk out"):
            prefill(model, asked, Needs(), chunk=7)
    else:
        pieces = [prefill(model, asked, Needs(), chunk=chunk).logits for chunk in (None, 1, 7)]
        assert all(torch.allclose(own, pieces[0], atol=2e-3) for own in pieces)
    with torch.no_grad():
        gold = plain(torch.tensor([[*asked, *more]])).logits[0, -1]
    decoding = Decoding.of(model, [left_of(model, [*asked], FullKV(), TOKENS)])
    assert torch.allclose(decoding.feed(more, alone=True)[0], gold, atol=2e-3)
    assert (name == "jamba") == model.stepwise


@every_model
def test_what_is_forced_leaves_no_trace(name: str) -> None:
    """Rows must not share states with each other or with the prompt that they are of."""
    model = pair(name)[1]
    left = left_of(model, [*prompt(TOKENS).ids], SnapKV(recent=3), BUDGET)
    first = Decoding.of(model, [left, left], again=True)
    logits = first.feed([prompt(TOKENS).ids[-1]])
    before = first.step([5, 7])
    again = Decoding.of(model, [left, left], again=True)
    assert torch.equal(again.feed([prompt(TOKENS).ids[-1]]), logits)
    again.answer_nll(logits, [5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert torch.equal(again.step([5, 7]), before)
    assert not torch.allclose(before[0], before[1], atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3-next", "jamba", "llama4"])
def test_a_conversation_goes_on_over_states(name: str) -> None:
    plain, model = pair(name)
    start, turn, limits = prompt(TOKENS), [21, 22, 23], Limits(4, frozenset())
    first = answer_of(plain, [*start.ids], 4)
    second = answer_of(plain, [*start.ids, *first, *turn], 4)
    talk = Prompt(start.ids, start.context, (), limits, turns=(NextTurn(turn, limits),))
    assert list(run(model, talk, CELLS[-1])[0].token_ids) == [*first, *second]
    talk = Prompt(start.ids, start.context, (), limits, turns=(NextTurn(turn, limits),) * 3, again=True)
    assert len(run(model, talk, CELLS[0])[0].token_ids) == 16


@pytest.mark.parametrize("name", ["qwen3-next", "jamba", "llama4"])
@pytest.mark.parametrize("tokens", [TOKENS, 2 * CHUNK])
def test_a_turn_that_is_observed_leaves_what_decoding_it_does(name: str, tokens: int) -> None:
    model, policy, turn = pair(name)[1], SnapKV(recent=3), [21, 22, 23, 24, 25]
    ids = [*prompt(tokens).ids]
    prefilled = prefill(model, ids, policy.needs)
    left = compress(prefilled, policy, tokens)  # everything, so that nothing but the way differs
    left.budget = 2 * tokens
    decoding = Decoding.of(model, [left], again=True)
    decoding.feed([ids[-1], *turn])
    now, _ = compress_again(model, left, note(prefilled, left), [ids[-1], *turn], tokens - 1)
    after = now.states[tokens + len(turn)].tensors
    for key, x in decoding.states.tensors.items():
        torch.testing.assert_close(after[key], x, atol=1e-4, rtol=1e-3)
    same = Decoding.of(model, [now])
    assert torch.allclose(same.step([3]), decoding.step([3]), atol=1e-3)
    assert same.nbytes(0) - sum(own.nbytes(0) for own in same.caches) == left.state_bytes


def test_hidden_states_of_a_prompt_in_two_parts_are_those_of_all_its_tokens() -> None:
    plain, model = pair("qwen3-next")
    ids, found = prompt(TOKENS).ids, list[torch.Tensor]()
    for layer in (1, 3):
        plain.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        plain(torch.tensor([ids]))
    for view, hidden in zip(prefill(model, ids, Needs(hidden_states=True)).view.layers, found, strict=True):
        assert view.source is not None and view.source.rope is not None
        assert torch.allclose(view.source.hidden, hidden, atol=1e-4)
        assert view.source.rope[0].shape[1] == TOKENS
    with pytest.raises(HarnessError, match="hides its hidden states"):
        prefill(pair("llama4")[1], ids, Needs(hidden_states=True))


@pytest.mark.parametrize("name", ["qwen3-next", "falcon-h1", "llama4"])
def test_generate_decodes_a_mixed_model_on_a_compressed_cache(name: str) -> None:
    plain, model = pair(name)
    ids = prompt(TOKENS).ids
    (alone,) = run(model, prompt(TOKENS), CELLS[0])
    with attached(plain, method="snapkv", budget=BUDGET, params={"recent": 3}) as report:
        assert answer_of(plain, [*ids]) == list(alone.token_ids)
    assert (report.kv_bytes, report.rows[0].state_bytes) == (alone.kv_bytes, alone.state_bytes)


def test_a_chunk_that_is_the_whole_context_is_no_limit_but_its_end_is() -> None:
    model = AttachedModel(build("llama4_text", {**LLAMA4, "attention_chunk_size": 32, "max_position_embeddings": 24}))
    assert model.compressible == [0, 1, 2, 3]
    with pytest.raises(PromptFailed, match="33 tokens, more than the model's context .* of 32"):
        prefill(model, prompt(33).ids, Needs())


def test_states_that_were_left_behind_are_missed() -> None:
    model = pair("qwen3-next")[1]
    decoding = Decoding.of(model, [left_of(model, [*prompt(TOKENS).ids], FullKV(), TOKENS)])
    decoding.states = States()
    with pytest.raises(HarnessError, match="cannot go on at 30 without its layers' states"):
        decoding.step([3])


@pytest.mark.parametrize("name", ["qwen3-next", "llama4"])
def test_memory_of_a_mixed_model_is_not_predicted_and_no_tables_are_compiled(name: str) -> None:
    with pytest.raises(HarnessError, match="memory of (linear|chunked)_attention layers is not predicted"):
        check_layers(pair(name)[1].config)
    with pytest.raises(HarnessError, match="no tables are compiled"):
        Rollout(Engine(pair(name)[1]), prompt(TOKENS).ids, [3], Needs())
