"""Models with random weights, made where they run from a config alone: for speed, memory and limits, never for a score.

A matrix product takes as long whatever it multiplies, so a shape is enough to time a model that nobody has to download.
What a method keeps does depend on the weights: see `vary_heads`.
"""

import hashlib
import json
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

SEED = 0
ASKS = re.compile(r"\b(q_proj|k_proj|qkv_proj|query_key_value)\.weight$")
"""Weights that make queries or keys, alone or with the others, in blocks of rows of a head each."""
SHARE = 8
"""One in so many dimensions of a head is strengthened."""
MOST = 4.0
"""How much at most."""


def random_model(config: Any, kind: torch.dtype, place: torch.device) -> PreTrainedModel:
    """Make a model as transformers starts one for training, on its device: the same weights each time on one kind.

    Norms are ones and biases zeros where the model has them so; ties are those of the config. On the meta device it
    has no weights.
    """
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(SEED)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=kind)
        vary_heads(model)
    return model


@torch.no_grad()
def vary_heads(model: PreTrainedModel) -> None:
    """Make the attention of every head sharper by a factor of its own, from 1 to `MOST` in some of its dimensions.

    Heads of equal random weights attend alike, and methods that share slots out between heads would give each the
    same. A norm of queries and keys undoes a factor on a whole head, but not one on some of its dimensions: the last
    of each half, which RoPE turns slowest. Where projections have other names than `ASKS`, heads stay alike.
    """
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    half, some = width // 2, max(1, width // (2 * SHARE))
    for name, weight in model.named_parameters():
        if ASKS.search(name) and weight.shape[0] % width == 0:
            factors = torch.ones(weight.shape[0] // width, width)
            sharper = MOST ** torch.rand(len(factors), 1)
            factors[:, half - some : half] = factors[:, width - some :] = sharper
            weight.mul_(factors.to(weight).reshape(-1, 1))


def revision_of(config: dict[str, Any]) -> str:
    """The content hash that records know such a model by."""
    return hashlib.sha256(json.dumps(["random", SEED, SHARE, MOST, config], sort_keys=True).encode()).hexdigest()
