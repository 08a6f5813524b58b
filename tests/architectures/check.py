"""What the harness makes of one architecture: with the full cache the plain model, compressed what a policy kept.

The plain model is transformers' own eager attention, run over the prompt and our greedy answer at once: where its best
token at every place is the next one of the answer, its own greedy answer is the same. Its cache is weighed.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.engine.compress import Compressed, compress
from harness.engine.decode import Decoding
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from methods.base import KVPolicy
from methods.fullkv import FullKV
from methods.snapkv import SnapKV
from tests.architectures.shapes import VOCAB, build

TOKENS, NEW, BUDGET = 23, 8, 12
NEAR, MIXED = 2e-4, 2e-3
"""Most that logits differ by, of the largest one: steps of transformers' Mamba-2 are a thousandth off its scan."""
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
    layers = int(getattr(plain.config.get_text_config(decoder=True), "num_hidden_layers", 0))
    try:
        model = AttachedModel(copy.deepcopy(plain))
        whole = _compressed(model, FullKV(), TOKENS, chunk=None if model.stepwise else 9)
    except HarnessError as error:
        return Row(kind, layers, 0, str(error))
    some = _compressed(model, SnapKV(recent=4), BUDGET)
    (full, kept), answer = _decoded(model, [whole, some])
    with torch.inference_mode():
        gold = plain(input_ids=torch.tensor([prompt() + answer])).logits[0, TOKENS - 1 : -1].float()
        caches = plain(input_ids=torch.tensor([prompt()]), use_cache=True).past_key_values.layers
    for what, found in (
        ("after the prompt", whole.logits),
        ("of it in one piece", some.logits),
        ("of an answer", full),
    ):
        _same(f"{kind}: logits {what}", found, gold[: len(found)], MIXED if model.mixed else NEAR)
    if torch.allclose(kept, full, atol=10 * MIXED):
        raise WrongError(f"{kind}: compressed, it answers as with the full cache")
    _weigh(kind, model, whole, some, caches)
    return Row(kind, layers, len(model.compressible))


def prompt() -> list[int]:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCAB, (TOKENS,), generator=draw).tolist()


def _compressed(model: AttachedModel, policy: KVPolicy, budget: int, chunk: int | None = None) -> Compressed:
    return compress(prefill(model, prompt(), policy.needs, chunk=chunk), policy, budget)


def _decoded(model: AttachedModel, rows: list[Compressed]) -> tuple[Tensor, list[int]]:
    """Logits [R, NEW, V] of rows in one batch after the prompt; the first row's greedy answer, which all are fed."""
    with torch.inference_mode():
        decoding = Decoding.of(model, rows, again=True)
        logits, answer = [decoding.feed(prompt()[-1:])], list[int]()
        decoding.answer_nll(logits[0], prompt()[:3])  # which leaves no trace
        while len(answer) < NEW:
            answer.append(int(logits[-1][0].argmax()))
            logits.append(decoding.step([answer[-1]] * len(rows)))
    return torch.stack(logits[:-1], dim=1), answer


def _same(what: str, found: Tensor, gold: Tensor, near: float) -> None:
    off, largest = (found - gold).abs().max().item(), gold.abs().max().item()
    if not off < near * max(1.0, largest):
        raise WrongError(f"{what} differ by {off:.2g} of {largest:.2g}")
    if not torch.equal(found.argmax(dim=-1), gold.argmax(dim=-1)):
        raise WrongError(f"{what} choose other tokens")


def _weigh(kind: str, model: AttachedModel, whole: Compressed, some: Compressed, caches: list[Any]) -> None:
    """The full cache weighs what transformers' does; compressed, every full layer keeps the budget."""
    slots, full = list[int](), _state_bytes(caches)
    kept = full
    for i, cache in enumerate(own for own in caches if getattr(own, "keys", None) is not None):
        heads, held = cache.keys.shape[1:3]
        slot = (cache.keys.nbytes + cache.values.nbytes) // held  # in all heads
        window, chunk = model.windows[i], model.chunks[i]
        seen = (TOKENS - 1) % chunk + 1 if chunk else min(TOKENS, window or TOKENS)
        apart = chunk or window
        full += slot * seen
        kept += slot * seen if apart else (slot + heads * POSITION_BYTES) * BUDGET
        slots += [] if apart else [heads * BUDGET]
        if held != min(TOKENS, apart - 1 if apart else TOKENS):  # the next token is to join them
            raise WrongError(f"{kind}: attention layer {i} holds {held} tokens in transformers' cache")
    for name, found, gold in (
        ("full bytes", whole.kv_bytes, full),
        ("bytes", some.kv_bytes, kept),
        ("state bytes", some.state_bytes, _state_bytes(caches)),
        ("kept slots", some.kept_slots, tuple(slots)),
    ):
        if found != gold:
            raise WrongError(f"{kind}: {name} are {found}, not {gold}")


def _state_bytes(caches: list[Any]) -> int:
    """Of layers, or parts of layers, without keys and values."""
    states = [getattr(cache, name, {}) for cache in caches for name in ("conv_states", "recurrent_states")]
    return sum(x.nbytes for own in states for x in own.values() if x is not None)
