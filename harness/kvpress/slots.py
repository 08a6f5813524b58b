"""Which token each slot holds that a foreign function left of keys and values. Exact, or not told."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from methods.base import KV

GATHER = {torch.gather, torch.Tensor.gather}
SAME = {torch.Tensor.contiguous, torch.Tensor.clone, torch.clone}


class Tracked(TorchFunctionMode):
    """Follows tensors [B, H, T, D], whose slot t holds token t, through `gather` along the slots while entered."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, kept alive, and its positions
        for tensor in tensors:
            tokens = torch.arange(tensor.shape[2], device=tensor.device)
            self.known[id(tensor)] = tensor, tokens.expand(tensor.shape[:3])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        before = self.known.get(id(args[0])) if args else None
        if before is None:
            return out
        if func in SAME:
            self.known[id(out)] = out, before[1]
        elif func in GATHER and not kwargs and args[1] in (2, -2) and args[2].stride(-1) == 0:  # one token a row
            self.known[id(out)] = out, before[1].gather(2, args[2][..., 0])
        return out

    def positions(self, keys: Tensor, values: Tensor, whole: KV) -> Tensor | None:
        """Return the tokens [B, H, S] int64 of the slots of `keys` and `values`, or None where nothing tells them.

        whole: the cache as it was, for rows that were not gathered: they are found again by their bits.
        """
        for tensor in (values, keys):
            found = self.known.get(id(tensor))
            if found is not None:
                return found[1]
        return rows(keys, whole.keys)


def rows(some: Tensor, whole: Tensor) -> Tensor | None:
    """Find the rows `some` [B, H, S, D] in `whole` [B, H, T, D]: places [B, H, S], None unless each is there once."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(2**62, (whole.shape[-1],), generator=generator).to(whole.device)
    asked, stored = ((_bits(x) * weights).sum(dim=-1) for x in (some, whole))  # wraps around: a hash of each row
    same = asked.unsqueeze(-1) == stored.unsqueeze(-2)  # [B, H, S, T]
    if bool((same.sum(dim=-1) != 1).any()):
        return None
    place = same.int().argmax(dim=-1)
    found = whole.gather(2, place.unsqueeze(-1).expand(some.shape))
    return place if bool((_bits(found) == _bits(some)).all()) else None


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).long()
