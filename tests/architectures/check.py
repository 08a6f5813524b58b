"""What the harness makes of one architecture: with the full cache the plain model, compressed what a policy kept.

The plain model is transformers' own eager attention, run once over the whole text without a cache, and by `generate`
with its own cache, whose bytes are counted.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.engine.compress import Compressed, compress
from harness.engine.decode import Decoding
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from methods.base import KVPolicy
from methods.fullkv import FullKV
from methods.snapkv import SnapKV
from tests.architectures.shapes import VOCAB, build

TOKENS, NEW, BUDGET, ATOL = 23, 8, 12, 2e-3
POSITION_BYTES = 4


class WrongError(AssertionError):
    """An architecture that the harness accepts and does not compute."""


@dataclass(frozen=True)
class Row:
    """layers: of the model. compressed: those that policies see; 0 where `reason` says why it is refused."""

    kind: str
    layers: int
    compressed: int
    reason: str = ""


def check(kind: str) -> Row:
    """Run one architecture. Raises WrongError where it is accepted and is not the plain model."""
    plain = build(kind)
    layers = int(plain.config.get_text_config(decoder=True).num_hidden_layers)
    try:
        attached = AttachedModel(copy.deepcopy(plain))
        whole = _compressed(attached, FullKV(), TOKENS)
    except HarnessError as error:
        return Row(kind, layers, 0, str(error))
    gold, ids, caches = _plain(plain)
    found = _decoded(attached, whole, ids)
    _same(f"{kind}: logits with the full cache", found, gold[TOKENS - 1 : -1])
    some = _compressed(attached, SnapKV(recent=4), BUDGET)
    _bytes(kind, attached, whole, some, caches)
    if torch.allclose(_decoded(attached, some, ids), found, atol=10 * ATOL):
        raise WrongError(f"{kind}: compressed, it answers as with the full cache")
    return Row(kind, layers, len(attached.compressible))


def prompt() -> list[int]:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCAB, (TOKENS,), generator=draw).tolist()


def _plain(model: PreTrainedModel) -> tuple[Tensor, list[int], list[Any]]:
    """Logits [T + NEW, V] of prompt and greedy answer, the answer, and the layers of transformers' cache after it."""
    given = torch.tensor([prompt()])
    made: Any = model.generate(  # type: ignore[operator]
        given, max_new_tokens=NEW, do_sample=False, eos_token_id=None, return_dict_in_generate=True, pad_token_id=0
    )
    with torch.inference_mode():
        logits = model(input_ids=made.sequences).logits[0].float()
        cache = model(input_ids=given, use_cache=True).past_key_values
    return logits, made.sequences[0, TOKENS:].tolist(), cache.layers


def _compressed(model: AttachedModel, policy: KVPolicy, budget: int) -> Compressed:
    return compress(prefill(model, prompt(), policy.needs), policy, budget)


def _decoded(model: AttachedModel, compressed: Compressed, answer: list[int]) -> Tensor:
    """Logits [NEW, V] after the prompt and each token of the answer but its last; the prompt's last is fed again."""
    with torch.inference_mode():
        decoding = Decoding.of(model, [compressed], again=True)
        logits = [decoding.feed(prompt()[-1:])]
        logits += [decoding.step([token]) for token in answer[:-1]]
    return torch.cat(logits)


def _same(what: str, found: Tensor, gold: Tensor) -> None:
    off = (found - gold).abs().max().item()
    if not off < ATOL * max(1.0, gold.abs().max().item()):
        raise WrongError(f"{what} differ by {off:.2g} of {gold.abs().max().item():.2g}")
    if not torch.equal(found.argmax(dim=-1), gold.argmax(dim=-1)):
        raise WrongError(f"{what} choose other tokens")


def _bytes(kind: str, model: AttachedModel, whole: Compressed, some: Compressed, caches: list[Any]) -> None:
    """The full cache weighs what transformers' does; compressed, every full layer keeps the budget."""
    full = kept = 0
    slots = []
    for i, cache in enumerate(caches):
        heads, held = cache.keys.shape[1:3]
        slot = (cache.keys.nbytes + cache.values.nbytes) // held  # in all heads
        window = model.windows[i]
        seen = TOKENS if window is None else min(TOKENS, window)
        full += slot * seen
        kept += slot * seen if window else (slot + heads * POSITION_BYTES) * BUDGET
        slots += [] if window else [heads * BUDGET]
        if held != (TOKENS if window is None else min(TOKENS, window - 1)):  # the next token is to join them
            raise WrongError(f"{kind}: layer {i} holds {held} tokens in transformers' cache")
    for name, found, gold in (
        ("full bytes", whole.kv_bytes, full),
        ("bytes", some.kv_bytes, kept),
        ("kept slots", some.kept_slots, tuple(slots)),
    ):
        if found != gold:
            raise WrongError(f"{kind}: {name} are {found}, not {gold}")
