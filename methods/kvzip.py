"""KVzip: keep the keys that a model looks at while it repeats its context, whatever will be asked of it.

Source: https://arxiv.org/abs/2505.23416 and its released code (`attention/score.py:45`, `model/wrapper.py:188`). After
the prefill the model is asked to repeat the context, chunk by chunk (2000 tokens), and is fed the chunk as its answer.
A key's score is the most attention that a query of this second pass pays to it, over queries and query group, where a
chunk is weighed against itself, the system prompt and the repetition. One top-k over all layers and heads, without a
floor; `layer` has a top-k of each layer's heads, `uniform` the same number in every head. The pass costs what the
prefill does or more, and is counted as observation. `kvpress` is KVzipPress (0.5.5; kvzip_press.py at 8bb29b9): chunks
of 2048, and of the chat template's first tokens 4 are weighed and kept, the others are the first to go, as by default,
for here they are paid out of the budget; `paper` keeps and weighs all of them, as the released code does; `plus` is
its `kvzip_plus_normalization`, what KVzap is trained on: weights over the norm of the hidden state that asks, times
the norm of what the value adds to the output.
Differences: what is not repeated, the chat template's tokens before and behind the user's text, is kept as its authors
keep it, but paid out of the budget, and given up from the first token on where the budget does not hold it. Where a
policy sees the question it is repeated with the context, and the request follows in a message of its own. Weights are
float32, where the code's are the model's type, with the layer's soft cap and sinks. Its top-k keeps a pair or two
fewer than asked, this one what is asked. A later chunk of `kvpress` is asked for in the authors' words, which end in a
space there. Left out: scores of whole heads that are loaded instead of found (`level=head`), and Fast KVzip
(2601.17668), whose gates are trained.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from methods.adakv import ragged_slots
from methods.base import KV, KVPolicy, LayerView, Needs, PromptView, at_least
from methods.registry import method
from methods.repeat import Repeat, repeated

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"sinks": None},
    "kvpress": {"chunk": 2048},
    "plus": {"chunk": 2048, "normed": True},
    "layer": {"share": "layer"},
    "uniform": {"share": "head"},
}
CODE = "https://github.com/snu-mllab/KVzip at 5d84729"
Share = Literal["model", "layer", "head"]
"""Whose heads share slots out among them by one top-k: the model's or a layer's; head: none do."""


@method("kvzip", paper="https://arxiv.org/abs/2505.23416", code=CODE, presets=PRESETS)
@dataclass(frozen=True)
class KVzip(KVPolicy):
    """What the model looks at when it repeats its prompt, by one top-k over all layers and heads.

    sinks: first tokens that are kept; None for those that the chat template puts before the text. share: among whose
    heads slots are shared out: of the model, or of a layer; head: none.
    """

    chunk: int = 2000
    sinks: int | None = 4
    normed: bool = False
    share: Share = "model"

    def __post_init__(self) -> None:
        at_least(self, 1, "chunk")
        at_least(self, 0, "sinks")

    @property
    def asked(self) -> Repeat:
        return Repeat(chunk=self.chunk, sinks=self.sinks, normed=self.normed)

    @property
    def needs(self) -> Needs:
        return Needs(repeat=frozenset({self.asked}))

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        layers = view.layers
        scores = [layer.only_live(layer.memo(self.asked, self.score)) for layer in layers]
        sinks, recent = self.ends(layers[0], budget)
        slots = ragged_slots(scores, budget, sinks=sinks, recent=recent, **shared_out(self.share))
        return [layer.kv.take(own) for layer, own in zip(layers, slots, strict=True)]

    @property
    def ranks_tokens(self) -> bool:
        return True

    def ends(self, view: LayerView, budget: int) -> tuple[int, int]:
        known = repeated(view, self.asked)
        return known.start if self.sinks is None else self.sinks, view.seen - known.end

    def score(self, view: LayerView) -> Tensor:
        """Return the most attention that each token got: [B, H, T]; 0 for what was not repeated."""
        return repeated(view, self.asked).received.amax(dim=2)


def shared_out(share: Share) -> dict[str, Any]:
    """Return how `ragged_slots` shares slots out so."""
    even = share == "head"
    return {"safeguard": float(even), "floor": not even, "across": share == "model"}
