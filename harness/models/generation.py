"""What a model's files say of generating: every token that ends a turn, and what greedy decoding does not follow."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.errors import shown

TURN_ENDS = ("eos_token", "eot_token", "eom_token")
"""Names of tokens in a tokenizer's files: end of text, of a turn, of a message."""
CHANGES_TEXT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), (1.0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("penalty_alpha", "exponential_decay_length_penalty", "diversity_penalty"), (0, 0.0)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "constraints"), ([],)),
    **dict.fromkeys(("sequence_bias", "watermarking_config", "dola_layers"), ({}, [])),
    **dict.fromkeys(("stop_strings", "max_time"), ([], "")),
    "token_healing": (False,),
}
"""Settings of a generation config by which `generate` writes other text than the likeliest, and values at which none.

Sampling is not among them: every run here is greedy.
"""
VALUE_CHARS = 60


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that any of the model's files names as an end: of text, of a turn, of a message."""
    return frozenset(_ends(model, tokenizer))


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        for token in ids if isinstance(ids, list | tuple) else [ids]:
            if type(token) is int and token >= 0:
                yield token
    named = {**tokenizer.init_kwargs, **tokenizer.special_tokens_map}
    for name in TURN_ENDS:
        token = str(named.get(name) or "")
        found = tokenizer.convert_tokens_to_ids(token) if token else None
        if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token:  # not the unknown one's
            yield found


def set_aside(model: PreTrainedModel) -> tuple[str, ...]:
    """What the model's generation config asks for and our greedy decoding does not do, each in some words."""
    config, found = model.generation_config, []
    for name, neutral in CHANGES_TEXT.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            found.append(f"generation config set aside: {name}={shown(value, VALUE_CHARS)}")
    return tuple(found)
