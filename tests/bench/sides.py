"""The two sides of every comparison: this harness and kvpress, on the same weights and the same token ids.

kvpress is driven as its users evaluate: one `KVPressTextGenerationPipeline` call per (method, budget). The pipeline is
entered at `forward`, after its tokenizer, so that both sides see the same ids, and it stays free of the bookkeeping of
`generate`, which makes it the faster of kvpress's two ways. No text ends early, so both sides decode the same number
of tokens.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kvpress
import torch
from transformers import DynamicCache

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.models.assets import fetch
from harness.models.load import LoadedModel, load_model
from harness.records.spec import FirstToken, QueryMode
from methods.base import KV, Budget
from methods.registry import make_policy

NEW_TOKENS = 32
NEEDLE = " The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
QUESTION = "\n\nWhat is the best thing to do in San Francisco? Answer in one sentence."
MARK = "CONTENT7MARK"


@dataclass(frozen=True)
class Text:
    """A chat prompt of an exact number of tokens.

    context: all but the last token. kvpress's pipeline compresses that and feeds the rest, which `query="agnostic"`
    does too; a rest of several tokens breaks kvpress where layers keep different numbers (one mask for all of them).
    """

    ids: list[int]

    @property
    def context(self) -> int:
        return len(self.ids) - 1

    @property
    def tensor(self) -> torch.Tensor:
        return torch.tensor([self.ids])

    def prompt(self) -> Prompt:
        """As the engine takes it: 32 greedy tokens, no end-of-text, no reference answer."""
        return Prompt(self.ids, self.context, (), Limits(NEW_TOKENS, frozenset()))


def make_text(tokenizer: Any, tokens: int) -> Text:
    """Essays with a needle in the middle and a question at the end, `tokens` tokens with the chat template."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    message = [{"role": "user", "content": MARK}]
    before, after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split(MARK)
    essays = "\n".join(path.read_text(encoding="utf-8") for path in sorted(fetch("essays").glob("*.txt")))
    head, needle, question, tail = (encode(part) for part in (before, NEEDLE, QUESTION, after))
    room = tokens - len(head) - len(needle) - len(question) - len(tail)
    hay = encode(essays[: 8 * tokens])[:room]
    assert len(hay) == room > 0
    return Text([*head, *hay[: room // 2], *needle, *hay[room // 2 :], *question, *tail])


def ratio(budget: int, tokens: int) -> float:
    """The compression ratio at which kvpress keeps `budget` of `tokens`; it truncates, so a millionth is added."""
    return 1 - (budget + 1e-6) / tokens


def cell(label: str, budget: int | None = None) -> Cell:
    return Cell(make_policy(label), None if budget is None else Budget(tokens=budget))


@dataclass(frozen=True)
class Peer:
    """A kvpress press. eager: it reads attention weights, which only transformers' eager attention returns."""

    press: str
    eager: bool = False

    def make(self, budget: int, tokens: int) -> Any:
        return getattr(kvpress, self.press)(compression_ratio=ratio(budget, tokens))


# snapkv_shared has no peer; KnormPress, the cheapest scorer of kvpress, stands in, in kvpress's favour.
PEERS = {
    "snapkv@kvpress": Peer("SnapKVPress"),
    "pyramidkv@kvpress": Peer("PyramidKVPress"),
    "h2o@kvpress": Peer("ObservedAttentionPress", eager=True),
    "streamingllm@kvpress": Peer("StreamingLLMPress"),
    "random": Peer("RandomPress"),
    "snapkv_shared@kvpress": Peer("KnormPress"),
}
EXACT = ("snapkv@kvpress", "pyramidkv@kvpress", "streamingllm@kvpress")  # the same rule and the same arithmetic


class Ours:
    """The harness with its model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.model = loaded, AttachedModel(loaded.model)

    def run(
        self, text: Text, cells: Sequence[Cell], *, query: QueryMode = "aware", first_token: FirstToken = "compressed"
    ) -> list[Outcome]:
        """Raises AssertionError when a cell did not run."""
        outcomes = Engine(self.model, query=query, first_token=first_token).run(text.prompt(), cells)
        assert [outcome.error for outcome in outcomes] == [None] * len(cells)
        return outcomes

    def compressed(self, text: Text, label: str, budget: int) -> tuple[list[KV], list[KV]]:
        """Every layer's full cache, and what the method leaves of it."""
        policy = make_policy(label)
        view = Engine(self.model).prefill(text.ids, policy.needs).view
        with torch.inference_mode():
            return [layer.kv for layer in view.layers], policy.compress(view, budget)


class Theirs:
    """kvpress with its model. end-of-text is taken out of the generation settings."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model: Any = loaded.model
        self.model.generation_config.eos_token_id = None
        self.pipe = kvpress.KVPressTextGenerationPipeline(model=self.model, tokenizer=loaded.tokenizer)

    def evaluate(self, text: Text, label: str, budget: int) -> str:
        """One cell by the pipeline: compress the context, feed the last token, decode 32 tokens; the text."""
        peer = PEERS[label]
        wanted = "eager" if peer.eager else "sdpa"
        if self.model.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)
        inputs = {"context_ids": text.tensor[:, : text.context], "questions_ids": [text.tensor[:, text.context :]]}
        press = peer.make(budget, text.context)
        answers: list[str] = self.pipe.forward(inputs, press=press, max_new_tokens=NEW_TOKENS)
        return answers[0]

    def generate(self, text: Text, label: str | None = None, budget: int = 0) -> list[int]:
        """Plain `generate`, or `generate` inside a press; the new ids."""
        press = PEERS[label].make(budget, len(text.ids)) if label else None
        ids = text.tensor
        with press(self.model) if press else contextlib.nullcontext():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        new: list[int] = out[0, ids.shape[1] :].tolist()
        return new

    def compressed_keys(self, text: Text, label: str, budget: int) -> list[torch.Tensor]:
        """Keys [1, H, S, D] of every layer that a press leaves."""
        cache: Any = DynamicCache()
        with torch.inference_mode(), PEERS[label].make(budget, len(text.ids))(self.model):
            self.model.model(input_ids=text.tensor, past_key_values=cache)
        return [layer.keys for layer in cache.layers]


def make_sides(dtype: str) -> tuple[Ours, Theirs]:
    """Both sides on the packaged model, each with a copy of its own: one object cannot hold two attentions at once."""
    mine, other = (load_model("smollm2-135m", dtype=dtype, device="cpu", attn=attn) for attn in (None, "sdpa"))
    return Ours(mine), Theirs(other)
