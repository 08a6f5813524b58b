"""Whether the bytes of a submitted record follow from its budget, and its kept slots from its bytes.

A cache of T tokens takes F = W + slot x S bytes: S slots over the compressible layers (T per layer and KV head), W for
what no budget touches: sliding windows, chunks, states. Asking for b of T tokens allows A = W + (slot + p) x S x b/T,
where p are the bytes of a position: 4, and 0 in old records, which know no stored bytes. So a sample with an
uncompressed cell gives slot = (F - A + p S b/T) / (S (1 - b/T)) from each other cell, and the model has only one. What
a cell holds is at least W + (slot + p) x kept slots; the rest is its method's side data. Slots held as codes of b bits
take at least b over the bits of a plain number of a slot, and all slots of the prompt need no positions. What is stored
is no less than what is live. What is sent to another process is all of that and a short description.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from harness.records.record import OVER, CellKey, Record
from harness.records.relayed import HEADER_BYTES, LAYER_BYTES
from methods.budget import Budget
from tasks import load_tasks

ROUNDING = 1e-6
_tasks = cache(load_tasks)
POSITION_BYTES = 4  # of a slot, as in methods.views: imported from there, it would bring torch


class _Asked(NamedTuple):
    """What is kept of a record until the uncompressed cell of its sample is known."""

    where: str
    sample: tuple[str, str]
    share: float
    asked: int
    held: int
    kept: int
    least: float
    position: int


class _Full(NamedTuple):
    held: int
    slots: int
    even: bool


class Budgets:
    """Takes the `ok` records of a run one by one.

    cells: those of the run. least: by method, the least part of a plain slot that one of its slots takes.
    """

    def __init__(self, cells: Mapping[CellKey, Budget | None], least: Mapping[str, float]) -> None:
        self.cells, self.least = cells, least
        self._asked: list[_Asked] = []
        self._full: dict[tuple[str, str], _Full] = {}
        self._same: dict[tuple[int, int, int], int] = {}

    def problems(self, record: Record, where: str) -> Iterator[str]:
        """Say what is wrong with a record's bytes by itself. where: its name in what `across` finds."""
        budget = self.cells[record.method, record.budget]
        tokens, sample = record.compressed_tokens, (record.task, record.sample_id)
        if not min(tokens, record.kv_bytes, record.asked_bytes, record.full_bytes):
            yield "an `ok` cell has tokens and bytes, here one of them is 0"
            return
        resolved = None if budget is None else budget.resolve(tokens)
        if record.budget_tokens != resolved:
            yield f"budget {record.budget} of {tokens} tokens is {resolved} slots, not {record.budget_tokens}"
            return
        yield from _own_problems(record)
        slots = sum(record.kept_slots)
        if resolved is None or resolved >= tokens:
            if record.asked_bytes != record.full_bytes:
                yield f"{record.asked_bytes} bytes asked for, the whole cache has {record.full_bytes}"
            plain = ":" not in record.method  # another library's methods may drop channels
            if plain and record.kv_bytes < record.full_bytes * self.least.get(record.method, 1.0) * (1 - ROUNDING):
                yield f"{record.kv_bytes} bytes hold all tokens, the whole cache has {record.full_bytes}"
            if resolved is None and slots:
                self._full[sample] = _Full(record.full_bytes, slots, len(set(record.kept_slots)) == 1)
        else:
            part, least = resolved / tokens, self.least.get(record.method, 1.0)
            position = POSITION_BYTES if record.stored_bytes else 0
            own = _Asked(where, sample, part, record.asked_bytes, record.kv_bytes, slots, least, position)
            self._asked.append(own)
            same = self._same.setdefault((resolved, tokens, record.full_bytes), record.asked_bytes)
            if same != record.asked_bytes:
                yield f"{record.asked_bytes} bytes asked for, another record of the same budget has {same}"

    def across(self) -> Iterator[str]:
        """Say what does not fit the bytes of a slot that all records give; samples without a full cell are left out."""
        slots = {asked: _slot(asked, full) for asked in self._asked if (full := self._full.get(asked.sample))}
        if not slots:
            return
        usual = Counter(round(slot, 3) for slot in slots.values()).most_common(1)[0][0]
        for asked, slot in slots.items():
            full = self._full[asked.sample]
            windows = full.held - usual * full.slots
            if abs(slot - usual) > ROUNDING * usual + 1e-3:
                found = f"{slot:.1f} bytes a slot, elsewhere {usual:.1f}"
                yield f"{asked.where}: {asked.asked} bytes asked for make {found}"
                continue
            position = asked.position if asked.kept < full.slots else 0
            least = windows + (usual * asked.least + position) * asked.kept
            if full.even and asked.held < least * (1 - ROUNDING):
                yield f"{asked.where}: {asked.kept} kept slots of {usual:.1f} bytes do not fit into {asked.held} bytes"


def _slot(asked: _Asked, full: _Full) -> float:
    positions = asked.position * full.slots * asked.share
    return (full.held - asked.asked + positions) / (full.slots * (1 - asked.share))


def _own_problems(record: Record) -> Iterator[str]:
    held = record.stored_bytes or record.kv_bytes
    over = held > OVER * record.asked_bytes
    if over != record.over_budget:
        told = "" if record.over_budget else "not "
        yield f"{held} bytes of {record.asked_bytes} asked for, and over_budget is {told}set"
    if record.stored_bytes and (held < record.kv_bytes or record.stored_bytes_end < record.kv_bytes_end):
        yield f"{held} bytes stored, {record.stored_bytes_end} at the end, less than live"
    most = record.full_bytes * (2 if record.stored_bytes else 1)  # a slot is no smaller than its position
    if record.asked_bytes > most:
        yield f"{record.asked_bytes} bytes asked for, more than the {record.full_bytes} of the whole cache"
    yield from _sent_problems(record)
    kept = max((count for layer in record.needle_kept for count in layer), default=0)
    if kept > record.needle_tokens:
        yield f"{kept} of {record.needle_tokens} needle tokens are said to be kept"
    if record.compressed_tokens > record.prompt_tokens:
        yield f"{record.compressed_tokens} tokens compressed of a prompt of {record.prompt_tokens}"
    elif record.query == "aware" and record.compressed_tokens != record.prompt_tokens:
        yield f"{record.compressed_tokens} tokens compressed, the prompt has {record.prompt_tokens}"


def _sent_problems(record: Record) -> Iterator[str]:
    """A message holds the cache, and beside it no more than its description."""
    relayed = _tasks()[record.task].relayed
    if relayed != (record.relayed is not None):
        yield f"{record.task} is {'' if relayed else 'not '}answered by another process, the record says otherwise"
    elif record.relayed is not None:
        sent, most = record.relayed.sent_bytes, max(record.kv_bytes, record.stored_bytes) + HEADER_BYTES
        most += LAYER_BYTES * len(record.kept_slots)
        if not record.kv_bytes < sent <= most:
            yield f"{sent} bytes sent of a cache of {record.kv_bytes}, a message of it has at most {most}"
