"""A tiny random model of any causal language model type that transformers knows: its own defaults, shrunk by rules.

A rule names a number of a config by a pattern and says how small it becomes. What no rule fits keeps its default, so
scales, soft caps and shares of rotated dimensions are the type's own.
"""

import re
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, WINDOW, VOCAB = 4, 4, 2, 16, 64, 8, 97

RULES: list[tuple[str, int]] = [
    (r"(unpadded_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"(num_)?(hidden_|decoder_|encoder_|attention_)?layers|n_layers?|num_blocks", LAYERS),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups|index_n_heads", KV_HEADS),
    (r"(\w+_)?num_(\w+_)?heads|n_heads?|(\w+_)?attention_heads|mamba_n_heads|n_mamba_heads", HEADS),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|lru_width", WIDTH),
    (r"adapter_(in|out)_dim|adapter_input_size", WIDTH),
    (r"(\w+_)?(intermediate|ffn)_(size|dim|size_mlp)|ffn_hidden_size|\w+_ffn_hidden_size|dff|dim_ff|d_inner", WIDTH),
    (r"qk_head_dim", 2 * DIM),
    (r"(\w+_)?head_dim|v_head_dim|qk_\w+_head_dim|kv_channels|dim_head|d_head|mamba_d_head|mamba_headdim", DIM),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|\w*pad_token_id|\w*bos_token_id|\w*start_token_id", 1),
    (r"\w*eos_token_id|eod_token_id|sep_token_id|cls_token_id|mask_token_id", 2),
    (r"(kv|q|o)_lora_rank", 2 * DIM),
    (r"index_topk|index_block_size", 4),  # so few that some tokens are left out
    (r"index_topk_blocks", 2),
    (r"n_groups", 2),
    (r"sliding_window(_size)?|attention_chunk_size|window_size|attention_window_size|local_attention", WINDOW),
    (r"max_position_embeddings|n_positions|max_seq_len|model_max_length|context_length", 256),
    (r"\w*d_state|\w*state_size|mamba_dt_rank|time_step_rank|laurel_rank|hidden_size_per_layer_input", 8),
]


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": WIDTH // 2}
LATENT = {
    **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": DIM, "kv_lora_rank": DIM},
    **{"head_dim": 2 * DIM, "qk_nope_head_dim": DIM, "v_head_dim": DIM},
}
SLIDING = ["sliding_attention", "full_attention"] * 2
SHARED = {"layer_types": SLIDING, "num_kv_shared_layers": 2}
COMPASS_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
ODD: dict[str, dict[str, Any]] = {  # what no rule says: sizes that hang together, kinds of layers, what must bite
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "codegen": {"rotary_dim": DIM // 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": COMPASS_ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": WIDTH},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {f"swa_{name}": size for name, size in LATENT.items()},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 2 * WIDTH},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3n_text": {**SHARED, "intermediate_size": WIDTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": DIM // 2},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": DIM},
    "hunyuan_v1_moe": {"head_dim": DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"floor_scale": 4},
    "longcat_flash": {"num_layers": 2, "head_dim": DIM, "zero_expert_num": 2},
    "mamba2": {"head_dim": WIDTH // 2},
    "mellum": {"layer_types": SLIDING},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "ministral": {"head_dim": DIM, "layer_types": SLIDING},
    "mistral": {"sliding_window": None},
    "moshi": {"sliding_window": 256},  # the whole context, as its defaults have it
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "vaultgemma": {"attn_logit_softcapping": 2.0},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The numbers of a config that a rule makes smaller, and kinds of layers cut so that every kind occurs."""
    known = {field.name for field in fields(config)}
    found: dict[str, Any] = {}
    for name in known:
        old = vars(config).get(config.attribute_map.get(name, name))
        small = next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)
        if small is not None and isinstance(old, int) and not isinstance(old, bool) and old > 0:
            found[name] = small
        elif isinstance(old, list) and name.endswith(("layer_types", "block_type", "layers_types")):
            found[name] = kinds(old)
    if "kv_lora_rank" in known:
        found["num_key_value_heads"] = HEADS  # every head has its own, made of the latent
    return found | ODD.get(config.model_type, {})


def kinds(layers: list[str]) -> list[str]:
    """As many kinds of layers as fit, in the order in which they first come, over and over, the last kind last."""
    different = list(dict.fromkeys(layers))[:LAYERS]
    return [different[i % len(different)] for i in range(-LAYERS % len(different), LAYERS + -LAYERS % len(different))]


def tiny_config(kind: str) -> PreTrainedConfig:
    """The config of a model type, small."""
    return small(CONFIG_MAPPING[kind]())


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with the sizes of `shrunk`, and so its parts."""
    own = {name: getattr(config, name, None) for name in config.sub_configs}
    changes = {name: small(part) for name, part in own.items() if isinstance(part, PreTrainedConfig)}
    return type(config)(**changes | shrunk(config))


def build(kind: str) -> PreTrainedModel:
    """A random model in float32: matrices wide enough that attention is peaked, every bias, norm and sink its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 if weight.ndim > 1 else weight + 0.1 * torch.randn_like(weight))
    return model
