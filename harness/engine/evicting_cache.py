"""The layer cache of rows whose policy evicts while decoding: they stay at their budget while they grow."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.engine import gpu
from harness.engine.kernels import slot_attention, weighed_attention
from harness.engine.layer_cache import DecodingLayer, Parts, room_step, visible
from harness.engine.packed import Packed, each_tensor, pack, storage_bytes, survey, tensors_of
from methods.base import KV, KVPolicy, PolicyError, StepView
from methods.views import Form


@dataclass
class Faults:
    """What may be wrong in a step. On a CPU it is told at once; on a GPU, which is not waited for, by `check`."""

    noted: list[tuple[Tensor, Callable[[float], bool], PolicyError]] = field(default_factory=list)

    def note(self, found: Tensor, sound: Callable[[float], bool], error: PolicyError) -> None:
        """Raise `error`, now or later, unless the number `found` is `sound`."""
        if gpu.is_gpu(found.device):
            self.noted.append((found.float(), sound, error))
        elif not sound(found.item()):
            raise error

    def check(self) -> None:
        """Raise the first error since the last check."""
        noted, self.noted = self.noted, []
        found = torch.stack([number for number, _, _ in noted]).tolist() if noted else []
        for number, (_, sound, error) in zip(found, noted, strict=True):
            if not sound(number):
                raise error


@dataclass
class EvictingRow:
    """A row whose policy evicts after every decoded token. kv has at least one empty slot per head to write into.

    more: slots that it may still be widened by, as a prompt within its budget grows.
    """

    policy: KVPolicy
    budget: int
    kv: KV
    more: int = 0


@dataclass
class _Batch(EvictingRow):
    """Rows of one policy, budget and number of slots, in one KV: they are asked, and evict, at once."""

    rows: list[int] = field(default_factory=list)  # ascending; B of the KV
    measured: int | None = field(default=None, init=False)  # bytes of each row; None once memory came or went

    @property
    def held(self) -> KV | Packed:
        """What is held between two steps."""
        return self.kv

    @property
    def row_bytes(self) -> int:
        """Bytes that are allocated for each row between two steps."""
        if self.measured is None:
            self.measured = storage_bytes(tensors_of(self.held)) // len(self.rows)
        return self.measured

    def free(self, faults: Faults) -> Tensor:
        """Return an empty slot of each head: [B, H, 1]. That there is none to be had is a fault."""
        lowest, free = self.kv.positions.min(dim=-1, keepdim=True)
        if not self.more:
            faults.note(lowest.max(), lambda position: position < 0, self._full())
            return free
        if int(lowest.max()) < 0:
            return free
        step = min(self.more, room_step(self.kv.positions.shape[2]))
        self.kv, self.more, self.measured = with_room(self.kv, step), self.more - step, None
        return self.kv.positions.min(dim=-1, keepdim=True).indices

    def close(self) -> None:
        """End a step."""

    def mark(self) -> Any:
        """Return the state of now."""
        return each_tensor(Tensor.clone, self.kv), self.more

    def rewind(self, mark: Any) -> None:
        """Go back to a state."""
        (self.kv, self.more), self.measured = mark, None

    def _full(self) -> PolicyError:
        return PolicyError(f"{type(self.policy).__name__} left no slot for the next token; after_step must free one")


class _Unlike(_Batch):
    """A row (B = 1) whose heads have unlike numbers of slots: packed between two steps, padded within one."""

    def __init__(self, row: EvictingRow, number: int) -> None:
        super().__init__(row.policy, row.budget, row.kv, row.more, [number])
        columns = row.kv.positions.shape[2]
        self._packed = self._pack()
        empty = columns - max(self._packed.sizes) + row.more
        self._most = [size + empty for size in self._packed.sizes]  # slots of each head, the next token's too

    @property
    def held(self) -> Packed:
        return self._packed

    def free(self, faults: Faults) -> Tensor:
        if any(size >= most for size, most in zip(self._packed.sizes, self._most, strict=True)):
            raise self._full()
        self.kv = self._packed.kv(more=1)
        return self.kv.positions.min(dim=-1, keepdim=True).indices

    def close(self) -> None:
        before, self._packed = self._packed.sizes, self._pack()
        if self._packed.sizes != before:
            self.measured = None

    def mark(self) -> Any:
        return self._packed

    def rewind(self, mark: Any) -> None:
        self._packed, self.measured = mark, None

    def _pack(self) -> Packed:
        packed = pack(self.kv, 0, *survey([self.kv], 0, [False]))
        assert isinstance(packed, Packed)
        self.kv = self.kv.take(self.kv.positions[..., :0].long())
        return packed


class EvictingRows(DecodingLayer):
    """Rows that stay at their budget while they grow; one token at a time (Q = 1).

    In a sliding-window layer, which no policy sees, tokens leave as the window passes them.

    Args:
        rows: what each row kept, every KV of batch 1. It is the layer's from then on.
        position: position of the next token, the same for all rows.
    """

    single_step = True

    def __init__(self, rows: Sequence[EvictingRow], position: int) -> None:
        self.position, self.faults = position, Faults()
        alike: dict[Hashable, list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault(_alike(row) or i, []).append(i)
        batches = list[_Batch]()
        for own in alike.values():
            first, kvs = rows[own[0]], [rows[i].kv for i in own]
            if type(first.kv) is KV and len(set(first.kv.live.flatten().tolist())) > 1:
                batches += [_Unlike(rows[i], i) for i in own]
                continue
            kv = first.kv if len(own) == 1 else each_tensor(lambda *tensors: torch.cat(tensors), *kvs)
            batches.append(_Batch(first.policy, first.budget, kv, first.more, own))
        self._hold(batches)

    def append(self, keys: Tensor, values: Tensor) -> None:
        for batch, k, v in zip(self.batches, self._parts.split(keys), self._parts.split(values), strict=True):
            free, kv = batch.free(self.faults), batch.kv
            for held, x in ((kv.keys, k), (kv.values, v)):
                held.scatter_(2, free.unsqueeze(-1).expand(x.shape), x)
            kv.positions.scatter_(2, free, self.position)
        self.position += 1

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        last, window = self.position - 1, form.window
        asked = torch.arange(last, last + 1, device=queries.device)
        outputs = []
        for batch, query in zip(self.batches, self._parts.split(queries), strict=True):
            mask, attention = visible(batch.kv.positions, asked, window), None
            keys, values = batch.kv.load()
            if window is None and batch.policy.needs.decode_attention:
                out, attention = weighed_attention(query, keys, values, form, mask=mask)
            else:
                out = slot_attention(query, keys, values, form, mask=mask)
            outputs.append(out)
            if window is not None:
                batch.kv.positions.masked_fill_(batch.kv.positions <= last - window + 1, -1)
            else:
                _evict(batch, attention, self.faults, position=last)
            batch.close()
        return self._parts.join(outputs)

    def check(self) -> None:
        self.faults.check()

    def mark(self) -> Any:
        return self.position, [batch.mark() for batch in self.batches]

    def rewind(self, mark: Any) -> None:
        self.position, held = mark
        for batch, own in zip(self.batches, held, strict=True):
            batch.rewind(own)

    def keep(self, rows: Sequence[int]) -> None:
        place = {row: new for new, row in enumerate(rows)}
        kept = []
        for batch in self.batches:
            at = [i for i, row in enumerate(batch.rows) if row in place]
            if at:
                if len(at) < len(batch.rows):
                    batch.kv = each_tensor(itemgetter(at), batch.kv)
                batch.rows = [place[batch.rows[i]] for i in at]
                kept.append(batch)
        self._hold(kept)

    def nbytes(self, row: int) -> int:
        batch = self._batch_of(row)
        if isinstance(batch.held, Packed):
            return sum(x.nbytes for x in batch.held.tensors())
        at = batch.rows.index(row)
        return (batch.kv if len(batch.rows) == 1 else each_tensor(itemgetter(slice(at, at + 1)), batch.kv)).nbytes

    def stored_bytes(self, row: int) -> int:
        batch = self._batch_of(row)
        return storage_bytes(tensors_of(batch.held)) // len(batch.rows)

    @property
    def stored(self) -> list[int]:
        found = {row: batch.row_bytes for batch in self.batches for row in batch.rows}
        return [found[row] for row in range(len(found))]

    def _batch_of(self, row: int) -> _Batch:
        for batch in self.batches:
            if row in batch.rows:
                return batch
        raise IndexError(f"row {row} of {sum(len(batch.rows) for batch in self.batches)}")

    def _hold(self, batches: list[_Batch]) -> None:
        self.batches = batches
        self._parts = Parts([batch.rows for batch in batches], batches[0].kv.positions.device)


def _alike(row: EvictingRow) -> Hashable:
    """Equal for rows that one KV can hold, None for one that is held alone.

    What a subclass of KV holds besides tensors is one for the whole batch. It changes alike in rows that start alike:
    with the same fields and as many live slots in every head.
    """
    kv, side = row.kv, sorted(row.kv.extra.items())
    state = tuple(getattr(kv, own.name) for own in fields(kv)[len(fields(KV)) :])
    apart = any(x.shape[:2] != kv.positions.shape[:2] for _, x in side)
    if apart or any(isinstance(value, Tensor) or not isinstance(value, Hashable) for value in state):
        return None
    own = (("keys", kv.keys), ("values", kv.values), ("positions", kv.positions), *side)
    shapes = tuple((name, x.shape, x.dtype) for name, x in own)
    live = () if type(kv) is KV else tuple(kv.live[0].tolist())
    return row.policy, row.budget, row.more, type(kv), shapes, state, live


def _evict(batch: _Batch, attention: Tensor | None, faults: Faults, *, position: int) -> None:
    kv = batch.kv
    if attention is not None:
        error = PolicyError(f"attention weights of the token at {position} are NaN; try --dtype float32")
        faults.note(attention[..., 0].sum(), math.isfinite, error)  # a row is sound, or all NaN
    freed = batch.policy.after_step(StepView(kv, attention, position, batch.budget))  # [B, H]
    if freed.shape != kv.positions.shape[:2]:
        name, wanted = type(batch.policy).__name__, list(kv.positions.shape[:2])
        raise PolicyError(f"{name}.after_step returned shape {list(freed.shape)}; give a slot to each head, {wanted}")
    slot = freed.unsqueeze(-1)
    at = slot.clamp(min=0)
    kv.positions.scatter_(2, at, kv.positions.gather(2, at).masked_fill_(slot >= 0, -1))


def with_room(kv: KV, more: int) -> KV:
    """A copy with `more` columns, which are empty (side data 0)."""
    sized = kv.positions.shape

    def grown(x: Tensor) -> Tensor:
        if x.shape[:3] != sized:
            return x.clone()
        return pad(x, (*[0] * 2 * (x.dim() - 3), 0, more), value=-1 if x is kv.positions else 0)

    return each_tensor(grown, kv)
