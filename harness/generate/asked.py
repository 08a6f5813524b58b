"""What a caller may ask of `harness.attached`, and of `generate` inside it: looked at once, before anything is done."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from harness.errors import HarnessError, shown
from harness.plan.methods import plan_budget
from harness.records.spec import FirstToken
from methods.base import Budget

ALLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "use_cache": (None, True),
    "guidance_scale": (None, 1, 1.0),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "cache_implementation": (None, "dynamic"),
    "custom_generate": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_model": (None,),
    "inputs_embeds": (None,),
    "position_ids": (None,),
    "cache_position": (None,),
}
"""Options of `generate` that need the whole cache, or a cache or places of their own, with the values that do not."""


class Arguments(BaseModel):
    """The arguments of `attached` beside the model, as it says of them. budget: parsed."""

    model_config = ConfigDict(frozen=True, strict=True, arbitrary_types_allowed=True)

    method: str = Field(min_length=1)
    budget: Budget | None
    first_token: FirstToken
    params: Mapping[str, Any] | None
    revision: str

    @field_validator("budget", mode="before")
    @classmethod
    def _parsed(cls, given: Any) -> Budget | None:
        if given is None or isinstance(given, str):
            return None if given is None else plan_budget(given)
        if isinstance(given, Integral) and not isinstance(given, bool):
            return Budget(tokens=int(given))
        if isinstance(given, float):
            return Budget(fraction=given)
        raise HarnessError(f"budget {shown(given)} is no budget; give tokens (512) or a fraction (0.25)")


def refuse(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], cache: type) -> None:
    """Raise HarnessError for a `generate` whose options need another cache than one of the class `cache`."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    for name, allowed in ALLOWED.items():
        value = kwargs.get(name, getattr(config, name, None))
        if not any(value is one or (isinstance(value, str | int | float) and value == one) for one in allowed):
            what = shown(value) if isinstance(value, str | int | float) else type(value).__name__
            raise HarnessError(f"generate({name}={what}) does not work on a compressed cache; leave {name} out")
    types = kwargs.get("token_type_ids")
    if isinstance(types, Tensor) and bool(types.any()):
        raise HarnessError("generate(token_type_ids=...) of several types does not work on a compressed cache of text")
    given = kwargs.get("past_key_values")
    if given is not None and not isinstance(given, cache):
        raise HarnessError(f"generate(past_key_values={type(given).__name__}) is not compressed; leave it out")


def rows_of(ids: Tensor, mask: Tensor | None, before: Tensor | None) -> list[list[int]]:
    """The new tokens of every row of ids [R, Q], without its left padding.

    mask: [R, columns so far + Q], 0 at padding. before: the part of it that came with the columns so far. Raises
    HarnessError for a mask that hides anything else.
    """
    if mask is None:
        rows: list[list[int]] = ids.tolist()
    else:
        seen = 0 if before is None else before.shape[1]
        if mask.shape != (ids.shape[0], seen + ids.shape[1]):
            wanted = [ids.shape[0], seen + ids.shape[1]]
            raise HarnessError(f"the attention mask has the shape {list(mask.shape)}; give one of {wanted}")
        if before is not None and not torch.equal(mask[:, :seen].bool(), before):
            raise HarnessError("the attention mask hides other tokens than it did when they were read; keep its start")
        real = _checked(mask[:, seen:])
        rows = [row[own].tolist() for row, own in zip(ids, real, strict=True)]
    if not all(rows):
        raise HarnessError(f"row {rows.index([])} of the prompts has no token; leave it out, or put one in")
    return rows


def _checked(mask: Tensor) -> Tensor:
    """A mask [R, Q] as bool, of rows that are padded on the left or not at all."""
    real = mask.bool()
    if not bool((mask == real).all()):
        raise HarnessError("the attention mask is not of 0 and 1 alone; give 0 for padding and 1 for the prompt")
    hidden = (real.cummax(dim=1).values & ~real).any(dim=1)  # after the first token of a row
    for row in hidden.nonzero().flatten().tolist():
        first, last = (int(real[row].nonzero()[end]) for end in (0, -1))
        if not bool(real[row, first : last + 1].all()):
            hole = first + int((~real[row, first:]).nonzero()[0])
            raise HarnessError(
                f"the attention mask of row {row} has a hole at column {hole}, between tokens of the prompt; a cache "
                "is compressed of whole prompts, so take those tokens out of the ids, or give a mask without holes"
            )
        raise HarnessError("the prompts are padded on the right; tokenize them with padding_side='left'")
    return real
