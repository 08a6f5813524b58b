"""The seam to transformers on tiny random models of every checked type: uncompressed, it is the plain model."""

import copy
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness.engine.engine import Engine
from harness.engine.transformers_seam import ATTENTION, HALF_ROTATION, AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.errors import HarnessError
from methods.base import Budget, KVPolicy, Needs
from methods.fullkv import FullKV
from methods.random import RandomEviction
from methods.streamingllm import StreamingLLM

LAYERS, HEADS, DIM, WINDOW, NEW = 4, 2, 8, 8, 12
SLOT = 2 * DIM * 4  # bytes of one slot of one head
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "head_dim": DIM, "initializer_range": 0.2}
COUNTS = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": HEADS}
WORDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
SIZES: dict[str, Any] = {**WIDTHS, **COUNTS, **WORDS, "max_position_embeddings": 256}
LONG_AFTER = {"original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0, 1.1], "long_factor": [3.0, 5.0]}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS, **LONG_AFTER}
LONG = {"partial_rotary_factor": 0.5, "rope_parameters": LONG_ROPE, **LONG_AFTER}
GEMMA = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
ROPES = {"sliding_attention": 100.0, "full_attention": 1e6}
GEMMA_ROPE = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in ROPES.items()}
LATE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}

# type, changed sizes, sliding-window layers
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 0),
    "qwen2": ("qwen2", {}, 0),
    "qwen2-late-windows": ("qwen2", LATE, 2),
    "qwen3": ("qwen3", {}, 0),
    "mistral": ("mistral", {"sliding_window": None}, 0),
    "phi3": ("phi3", {"sliding_window": None}, 0),
    "phi3-partial-long-rope": ("phi3", LONG, 0),
    "gemma3": ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": DIM, "rope_parameters": GEMMA_ROPE}, 2),
    "gemma2": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0}, 2),
    "gpt-oss": ("gpt_oss", {**GEMMA, "num_local_experts": 2, "num_experts_per_tok": 1}, 2),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 0.1}, 0),
    "cohere2": ("cohere2", GEMMA, 2),
    "olmo3": ("olmo3", GEMMA, 2),
}
ONLY_EAGER = ("gemma2", "gpt-oss")  # the other attentions of transformers leave caps or sinks out
every_model = pytest.mark.parametrize("name", MODELS)


def build(kind: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):  # which transformers leaves as it finds them
            weight.data.normal_()
    return model


def pair(name: str) -> tuple[Any, AttachedModel]:
    """The same model twice: as transformers runs it, and attached."""
    kind, changes, _ = MODELS[name]
    model = build(kind, changes)
    attached = AttachedModel(copy.deepcopy(model))
    if name in ONLY_EAGER:
        model.set_attn_implementation("eager")
    return model, attached


def prompt(tokens: int, answer: tuple[int, ...] = ()) -> Prompt:
    ids = torch.randint(3, 97, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    return Prompt(ids, tokens * 2 // 3, answer, Limits(NEW, frozenset()))


def run(model: AttachedModel, asked: Prompt, policy: KVPolicy, budget: int | None = None, **options: Any) -> Outcome:
    cell = Cell(policy, None if budget is None else Budget(tokens=budget))
    outcome = Engine(model, **options).run(asked, [cell])[0]
    assert outcome.status == "ok", outcome.error
    return outcome


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_one_row_in_half_precision_is_that_of_several(dtype: torch.dtype) -> None:
    """Some processors add up one row of so many numbers in another order, and a cell alone would answer otherwise."""
    model = AttachedModel(build("llama", {"intermediate_size": 1536}).to(dtype))
    product = model.model.model.layers[0].mlp.down_proj
    rows = torch.randn(512, 1, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        assert torch.equal(torch.cat([product(row) for row in rows.split(1)]), product(rows))


@pytest.mark.parametrize("tokens", [5, 30])
@every_model
def test_the_uncompressed_engine_is_the_plain_model(name: str, tokens: int) -> None:
    plain, attached = pair(name)
    asked = prompt(tokens, answer=(5, 6, 7, 8))
    ids = torch.tensor([asked.ids])
    gold = plain.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0, tokens:].tolist()
    exact = plain.double()
    exact.set_attn_implementation("eager")
    exact.config._experts_implementation = "eager"  # the other one has no float64
    with torch.no_grad():
        logprobs = exact(torch.tensor([[*asked.ids, *asked.answer]])).logits[0].log_softmax(-1)
    nll = [-logprobs[tokens - 1 + i, token].item() for i, token in enumerate(asked.answer)]
    for options in ({}, {"first_token": "prefill"}, {"query": "agnostic"}):
        outcome = run(attached, asked, FullKV(), **options)
        assert list(outcome.token_ids) == gold
        assert outcome.nll_per_token == pytest.approx(nll, abs=1e-4)
    assert len(set(gold)) > 1  # a model that repeats one token would hide a wrong cache


def test_it_runs_where_kvpress_has_wrapped_every_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `attention_patch.py:85 at kvpress 8bb29b9`: dropout by its place, the rest by name."""
    registered = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def wrapper(module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float, **kwargs: Any) -> Any:
        return registered(module, query, key, value, mask, dropout, **kwargs)

    _, model = pair("llama")
    expected = run(model, prompt(20), FullKV()).token_ids
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION, wrapper)
    assert run(model, prompt(20), FullKV()).token_ids == expected


@every_model
def test_sliding_layers_are_left_alone_and_counted(name: str) -> None:
    sliding = MODELS[name][2]
    attached = pair(name)[1]
    full = LAYERS - sliding
    for tokens in (6, 30):
        whole = run(attached, prompt(tokens), FullKV())
        windows = sliding * min(tokens, WINDOW) * HEADS * SLOT
        assert whole.kv_bytes == whole.full_bytes == whole.asked_bytes == full * tokens * HEADS * SLOT + windows
        assert whole.kept_slots == (tokens * HEADS,) * full
        some = run(attached, prompt(tokens), RandomEviction(), 5)
        assert some.kv_bytes == some.asked_bytes == full * 5 * HEADS * (SLOT + 4) + windows == some.stored_bytes
        assert some.full_bytes == whole.full_bytes
        assert not some.over_budget


def test_what_a_sliding_layer_sees_is_no_policy_s_business() -> None:
    """Evicting everything but the last tokens from the full layers must still answer as a model masked by hand does."""
    _, attached = pair("gemma3")
    asked = prompt(30)
    outcome = run(attached, asked, StreamingLLM(sinks=0, evict=True), 6)
    kept = run(attached, asked, StreamingLLM(sinks=0), 6)
    assert outcome.token_ids[:1] == kept.token_ids[:1]
    sliding = 2 * (WINDOW - 1) * HEADS * (SLOT + 4)  # what the next token's window still reaches
    assert outcome.kv_bytes_end == 2 * 6 * HEADS * (SLOT + 4) + sliding


@pytest.mark.parametrize(("kind", "changes"), [("qwen2", LATE), ("gemma3_text", MODELS["gemma3"][1])])
def test_windows_of_some_layers_that_see_the_whole_context_are_none(kind: str, changes: dict[str, Any]) -> None:
    for window, seen in ((256, LAYERS), (255, LAYERS - 2)):
        plain = build(kind, {**changes, "sliding_window": window})
        attached = AttachedModel(copy.deepcopy(plain))
        assert len(attached.compressible) == seen
        gold = plain.generate(torch.tensor([prompt(30).ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert list(run(attached, prompt(30), FullKV()).token_ids) == gold[0, 30:].tolist()
        assert len(run(attached, prompt(30), RandomEviction(), 5).kept_slots) == seen


def test_a_model_of_sliding_layers_alone_has_nothing_to_compress() -> None:
    attached = AttachedModel(build("mistral", {"sliding_window": WINDOW}))
    with pytest.raises(HarnessError, match="every layer of this model has a sliding window"):
        Engine(attached).run(prompt(12), [Cell(FullKV(), None)])


def at_position(model: Any, keys: Tensor, position: int) -> Tensor:
    """Keys [1, H, S, D] with the RoPE that the model's own code gives its full-attention layers at one position."""
    rope = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    where = torch.full((1, keys.shape[2]), position)
    by_type = model.config.model_type in ("gemma3_text", "olmo3")
    kind = {"layer_type": "full_attention"} if by_type else {}
    cos, sin = rope(keys, where, **kind)
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    turned: Tensor = apply(keys, keys, cos, sin)[1]
    return turned


@pytest.mark.parametrize("name", [name for name, (kind, _, _) in MODELS.items() if kind in HALF_ROTATION])
def test_rotate_is_the_model_s_own_rope_at_the_shifted_position(name: str) -> None:
    _, attached = pair(name)
    model, keys = attached.model, torch.randn(1, HEADS, 3, DIM)
    for start, by in ((0, 1), (30, 7), (3, 150), (60, 0)):
        if "long-rope" in name and start < 16:
            continue  # at such a position this rope would fall back to its short set
        before, after = at_position(model, keys, start), at_position(model, keys, start + by)
        torch.testing.assert_close(attached.rotate(before, by), after, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(attached.rotate(keys, 7), keys, atol=1e-2)


def test_rotate_uses_the_frequencies_of_the_last_forward() -> None:
    """A rope with a long and a short set must turn the keys of a long prompt by the long one."""
    _, attached = pair("phi3-partial-long-rope")
    keys = torch.randn(1, HEADS, 1, DIM)
    turned = {}
    for tokens in (10, 30):
        Engine(attached).prefill(prompt(tokens).ids, Needs())
        turned[tokens] = attached.rotate(keys, 5)
    assert not torch.allclose(turned[10], turned[30], atol=1e-3)


def test_half_precision_keys_are_turned_in_float32() -> None:
    attached, keys = pair("llama")[1], torch.randn(1, HEADS, 3, DIM).bfloat16()
    turned = attached.rotate(keys, 1000)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, attached.rotate(keys.float(), 1000).bfloat16())


LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    **{"num_key_value_heads": 4},
}
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "own attention": ("bloom", {"n_layer": 2, "n_head": 4}, "attention code of its own"),
    "no order": ("llama", {"is_causal": False}, "sees tokens that follow"),
    "no order in its modules": ("gemma3_text", {"use_bidirectional_attention": True}, "sees tokens that follow"),
    "an untold window": (
        "phimoe",
        {"sliding_window": WINDOW},
        "window of None in attention layer 0, where its config says 8",
    ),
    "windows unused": ("smollm3", {"layer_types": GEMMA["layer_types"], "sliding_window": WINDOW}, "config says 8"),
    "no attention": ("mamba", {"num_hidden_layers": 2}, "no layer that keeps keys|with attention of their own"),
    "latent attention": ("deepseek_v3", LATENT, "has latent attention, which caches no keys and values"),
    "a cache of its own": ("minimax", {"num_local_experts": 2}, "does not run on a replaced cache|of type linear"),
    "states of its own": ("recurrent_gemma", {"num_hidden_layers": 3}, "attention of their own|of type linear"),
    "changed values": ("diffllama", {}, "changes keys or values|attention of their own|replaced cache"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_seam_cannot_do_is_refused_before_a_prompt_runs(name: str) -> None:
    kind, changes, message = UNSUPPORTED[name]
    with pytest.raises(HarnessError, match=message) as error:
        AttachedModel(build(kind, changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"position_bias": torch.zeros(1)}, {"strength": 0.5}, {"is_causal": False}])
def test_what_would_change_an_attention_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    registered = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    changed = lambda *args, **kwargs: registered(*args, **kwargs | given)  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION, changed)
    with pytest.raises(HarnessError, match="uses attention (position_bias|strength)|sees tokens that follow"):
        AttachedModel(build("llama", {}))


def test_heads_that_differ_between_kinds_of_layers_are_those_of_the_compressible_ones() -> None:
    """Gemma 4 with one KV head in its full layers: its config tells no number for the model."""
    changes = {**GEMMA, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16}
    sizes = AttachedModel(build("gemma4_text", {**changes, "hidden_size_per_layer_input": 0})).sizes(9)
    assert (sizes.layers, sizes.query_heads, sizes.kv_heads) == (2, 4, 1)


@pytest.mark.parametrize("kind", ["indexed_attention", "unheard_of"])
def test_a_layer_of_another_type_is_named(kind: str) -> None:
    model = build("qwen3", {})
    model.config.layer_types = ["full_attention"] * 3 + [kind]
    with pytest.raises(HarnessError, match=f"has layers of type {kind}; use a model of"):
        AttachedModel(model)


def test_an_unchecked_rope_is_not_turned() -> None:
    attached = AttachedModel(build("cohere2", {}))
    with pytest.raises(HarnessError, match="not checked for model type 'cohere2'"):
        attached.rotate(torch.zeros(1, 1, 1, DIM), 3)
    cells = [Cell(StreamingLLM(reassign=True), Budget(tokens=8)), Cell(FullKV(), None)]
    outcomes = Engine(attached).run(prompt(20), cells)
    assert [outcome.status for outcome in outcomes] == ["failed", "ok"]
    assert "'cohere2'" in (outcomes[0].error or "")


def test_a_prompt_s_cache_dies_with_its_last_reference() -> None:
    engine = Engine(pair("llama")[1])
    gc.disable()  # what only a collection would free has leaked
    try:
        prefilled = engine.prefill(prompt(12).ids, Needs(window=4, column_sums=True))
        keys = weakref.ref(prefilled.layers[0].keys)
        del prefilled
        assert keys() is None
    finally:
        gc.enable()
