"""Pages of a cache, of which a decoded token reads those that may hold the keys nearest to its query.

Of every page the lowest and the highest number of each key channel are stored: they bound the product of a query with
any key of the page. Letters as in `methods.base`, and P pages of `size` tokens, the last one perhaps not full.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.base import best
from methods.views import KV, POSITION_BYTES


@dataclass(frozen=True)
class Pages:
    """What is read. count: pages of a query, the last one, which grows, always among them.

    shared: the query heads of a KV head read the same pages; else each chooses its own.
    """

    size: int
    count: int
    shared: bool = False

    def of(self, slots: int) -> int:
        """Return how many pages so many slots of a head take."""
        return -(-slots // self.size)

    def bounds(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest numbers of keys [..., S, D], page by page: [..., P, D] each."""
        missing = self.of(keys.shape[-2]) * self.size - keys.shape[-2]
        whole = pad(keys, (0, 0, 0, missing))
        if missing:
            whole[..., keys.shape[-2] :, :] = keys[..., -1:, :]  # again: it changes no bound
        paged = whole.view(*whole.shape[:-2], -1, self.size, whole.shape[-1])
        return paged.amin(dim=-2), paged.amax(dim=-2)

    def chosen(self, queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Choose the pages that queries [H, G, D] read, by the bounds [H, P, D]: [H, G, P] bool."""
        asked = queries.float()
        most = asked.clamp(min=0) @ high.float().mT + asked.clamp(max=0) @ low.float().mT  # [H, G, P]
        if self.shared:
            most = most.amax(dim=1, keepdim=True).expand(most.shape).contiguous()
        most[..., -1] = torch.inf
        return torch.zeros_like(most, dtype=torch.bool).scatter_(2, best(most, self.count), True)


@dataclass
class PagedKV(KV):
    """Every slot of a prompt, in order. extra: `low` and `high`, [1, H, P, D], the bounds of its pages."""

    pages: Pages | None = None

    def reads(self, live: int) -> int:
        """The bounds of all pages, and the slots of `count` of them; more where query heads choose apart."""
        assert self.pages is not None
        bounds, heads = sum(x.nbytes for x in self.extra.values()), self.positions.shape[1]
        slots = min(live, heads * self.pages.count * self.pages.size)
        return bounds + slots * (self.slot_bytes - POSITION_BYTES)


def paged(kv: KV, pages: Pages) -> PagedKV:
    """All slots of `kv`, which is left alone, with the bounds of their pages."""
    low, high = pages.bounds(kv.keys)
    return PagedKV(kv.keys, kv.values, kv.positions, {"low": low, "high": high}, pages)
