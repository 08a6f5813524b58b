"""KVzap: keep the tokens whose hidden states tell that the model would look at them to repeat its context.

Source: https://arxiv.org/abs/2601.07891, kvzap_press.py and dms_press.py at kvpress 8bb29b9. A probe of each layer, an
MLP of one hidden layer (`linear`: none), predicts from what goes into the layer's attention the logarithm of what
KVzip's second pass would give each token in each KV head (`kvzip@plus`), at none of its cost. The authors keep what is
above one threshold in all layers and heads, and the last 128 tokens; here that threshold is the one that spends the
budget: one top-k over all layers and heads. `threshold` is DMSPress around it, with the threshold of their examples,
and finds its own budget. `kvpress` is KVzapPress by itself: every head keeps as many, its own best.
Differences: where the budget is below 256 the last tokens take half of it; the first 4 are kept, which the probe was
not shown; nothing is evicted while decoding. Probes are made by `harness compile kvzap` from calibration prompts,
their hidden layer is an eighth of the model's width (`harness.compiler.kvzap`); without any for a model it is told so,
and keeps the first and last tokens alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.adakv import ragged_slots
from methods.artefact import CompiledPolicy
from methods.base import KV, Kind, LayerView, Needs, PolicyError, PromptView, at_least
from methods.device import read
from methods.gvote import places
from methods.kvzap_probe import Probe, logits, names
from methods.kvzip import Share, shared_out
from methods.registry import method

PRESETS: dict[str, dict[str, Any]] = {
    "linear": {"probe": "linear"},
    "kvpress": {"recent": 0, "sinks": 0, "share": "head"},
    "threshold": {"threshold": -4.0},
}
CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"


@method("kvzap", paper="https://arxiv.org/abs/2601.07891", code=CODE, presets=PRESETS)
@dataclass(frozen=True)
class KVzap(CompiledPolicy):
    """The best tokens by a probe of the hidden states, by one top-k over all layers and heads.

    recent, sinks: last and first tokens that are kept; the last ones take half of the budget at most. share: among
    whose heads slots are shared out: of the model, or of a layer; head: none. threshold: what a token's predicted score
    must reach; there is no budget then, and `recent` is whole.
    """

    METHOD: ClassVar[str] = "kvzap"

    probe: Probe = "mlp"
    recent: int = 128
    sinks: int = 4
    share: Share = "model"
    threshold: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "recent", "sinks")

    @property
    def kind(self) -> Kind:
        return "budgeted" if self.threshold is None else "own"

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=not self.lacks)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        layers = view.layers
        scores = [layer.only_live(self._scores(layer, at)) for at, layer in enumerate(layers)]
        if self.threshold is not None:
            return self._above(self.threshold, layers, scores)
        recent = min(self.recent, budget // 2)
        slots = ragged_slots(scores, budget, sinks=self.sinks, recent=recent, **shared_out(self.share))
        return [layer.kv.take(own) for layer, own in zip(layers, slots, strict=True)]

    def _above(self, threshold: float, layers: Sequence[LayerView], scores: Sequence[Tensor]) -> list[KV]:
        """The tokens whose scores reach a threshold, and the first and last ones."""
        at = torch.arange(scores[0].shape[2], device=scores[0].device)
        ends = (at < self.sinks) | (at >= len(at) - self.recent)
        named = [(own >= threshold) | ends.to(own.device) for own in scores]
        most = read([own.sum(dim=-1).amax().view(1) for own in named])
        return [layer.kv.take(places(own, n)) for layer, own, (n,) in zip(layers, named, most, strict=True)]

    def _scores(self, view: LayerView, at: int) -> Tensor:
        """Predicted logarithms of scores of the `at`-th layer: [1, H, T] float32."""
        if self.lacks:
            return torch.arange(view.tokens, device=view.kv.keys.device).float().expand(view.kv.positions.shape)
        return view.memo(("kvzap", self.compiled, self.probe), lambda layer: self._predicted(layer, at))

    def _predicted(self, view: LayerView, at: int) -> Tensor:
        if view.source is None:
            raise PolicyError("kvzap needs hidden states, which were not observed; declare them in needs")
        hidden = view.source.hidden
        made = _placed(self, str(self.provenance()), hidden.device)
        own = {name: x[at : at + 1] for name, x in made.items()}
        return logits(hidden.float(), own, self.probe).transpose(1, 2)


@lru_cache(maxsize=8)
def _placed(policy: KVzap, made: str, device: torch.device) -> dict[str, Tensor]:
    """A probe's constants on a device, float32: they go there once, so that no prompt waits. made: which they are."""
    constants = policy.constants()
    return {name: constants[name].to(device, torch.float32) for name in names(policy.probe)}
