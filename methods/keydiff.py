"""KeyDiff: keep the keys that differ most from the others.

Source: https://arxiv.org/abs/2504.15364. The anchor is the mean of a head's keys of length one; a token is worth the
more, the smaller its cosine with the anchor.
Differences: the whole prompt is scored once. The paper evicts block by block while the prompt is read, to bound the
memory of the prefill; here, as in `kvpress`, the prompt is prefilled whole for every method.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from methods.base import EvictionPolicy, LayerView
from methods.registry import method


@method("keydiff", paper="https://arxiv.org/abs/2504.15364", presets={"kvpress": {}})
@dataclass(frozen=True)
class KeyDiff(EvictionPolicy):
    """Tokens whose keys are least like the mean key of their head."""

    def score(self, view: LayerView) -> Tensor:
        keys = normalize(view.kv.keys.float(), dim=-1)
        anchor = normalize(keys.mean(dim=2, keepdim=True), dim=-1)
        return -(keys * anchor).sum(dim=-1)
