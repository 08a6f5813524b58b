"""RecentKeys: keep the keys that are least like the recent ones, since what repeats is seen in them already.

An example, not a published method. Tokens are scored by the cosine of their key to the mean of the last `recent` keys,
per layer and KV head; the least similar ones are kept, and the recent ones always.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from methods.base import EvictionPolicy, LayerView, at_least
from methods.registry import method


@method("recent_keys", paper="control, no paper", presets={"short": {"recent": 4}})
@dataclass(frozen=True)
class RecentKeys(EvictionPolicy):
    """The keys least like the mean of the last `recent` ones, and those."""

    recent: int = 16

    def __post_init__(self) -> None:
        at_least(self, 1, "recent")

    def score(self, view: LayerView) -> Tensor:  # [B, H, T], higher is kept
        keys = view.kv.keys.float()
        mean = keys[:, :, -self.recent :].mean(dim=2, keepdim=True)  # [B, H, 1, D]
        return -cosine_similarity(keys, mean, dim=-1)
