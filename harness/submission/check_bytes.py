"""Whether the bytes of a submitted record follow from its budget, and its kept slots from its bytes.

A cache of T tokens takes F = W + slot x S bytes: S slots over the compressible layers (T per layer and KV head), W for
what no budget touches: sliding windows, chunks, states. Asking for b of T tokens allows A = W + (slot + p) x S x b/T,
where p are the bytes of a position: 4, and 0 in old records, which know no stored bytes. So a sample with an
uncompressed cell gives slot = (F - A + p S b/T) / (S (1 - b/T)) from each other cell, and the model has only one. What
a cell holds is at least W + (slot + p) x kept slots; the rest is its method's side data. A layer that is kept whole
needs no positions. A slot held as codes or latents takes at least what its method says of itself
(`KVPolicy.least_share`). What is stored is no less than what is live. A decoded token reads no more than what is live,
and W + slot x kept slots or, of codes, their part of it; only a method that chooses what to read for each token may
read less. Such a method holds everything, its budget is of tokens read, and it asks for the whole cache. Old records do
not tell what is read.

A method of its own budget asks for what it stores. What another one is given for it is the least number of slots whose
bytes are no fewer: A is no less than that, and less than that and a slot of every layer and KV head.

What is sent to another process is all that is held and a short description.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from typing import NamedTuple

from harness.records.record import OVER, CellKey, Record
from harness.records.relayed import HEADER_BYTES, LAYER_BYTES
from harness.records.spec import OWN
from harness.submission.check_manifest import CellBudget
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
    kept: Sequence[int]
    least: float
    read: int | None
    position: int
    slots: int
    like: str


class _Own(NamedTuple):
    """Of a method of its own budget."""

    where: str
    stored: int
    held: int
    kept: Sequence[int]
    least: float
    read: int | None


class _Full(NamedTuple):
    held: int
    slots: int
    even: bool


class Budgets:
    """Takes the `ok` records of a run one by one.

    cells: those of the run. least: by method, the least part of a plain slot that one of its slots takes. choosing:
    methods that read a part of what they keep.
    """

    def __init__(
        self, cells: Mapping[CellKey, CellBudget], least: Mapping[str, float], choosing: Set[str] = frozenset()
    ) -> None:
        self.cells, self.least, self.choosing = cells, least, choosing
        self._own: dict[tuple[str, str, str], _Own] = {}
        self._asked: list[_Asked] = []
        self._full: dict[tuple[str, str], _Full] = {}
        self._same: dict[tuple[int, int, int], int] = {}

    def problems(self, record: Record, where: str) -> Iterator[str]:
        """Say what is wrong with a record's bytes by itself. where: its name in what `across` finds."""
        budget = self.cells[record.method, record.budget]
        tokens = record.compressed_tokens
        if not min(tokens, record.kv_bytes, record.asked_bytes, record.full_bytes):
            yield "an `ok` cell has tokens and bytes, here one of them is 0"
            return
        resolved = budget.resolve(tokens) if isinstance(budget, Budget) else None
        if isinstance(budget, str):
            resolved = record.budget_tokens
            if not resolved or resolved >= tokens:
                yield f"{resolved} slots of {tokens} tokens are no budget that {budget} found"
                return
        if record.budget_tokens != resolved:
            yield f"budget {record.budget} of {tokens} tokens is {resolved} slots, not {record.budget_tokens}"
            return
        choosing = record.method in self.choosing
        yield from _own_problems(record, budgeted=not choosing)
        if record.budget == OWN:
            yield from self._finds(record, where)
        elif resolved is None or resolved >= tokens or choosing:
            yield from self._keeps_all(record, given=resolved is not None)
        else:
            yield from self._is_given(record, where, resolved, budget if isinstance(budget, str) else "")

    def _finds(self, record: Record, where: str) -> Iterator[str]:
        if record.asked_bytes != record.stored_bytes:
            yield f"{record.asked_bytes} bytes asked for, a method of its own budget stores {record.stored_bytes}"
        sizes = (record.stored_bytes, record.kv_bytes, record.kept_slots)
        own = _Own(where, *sizes, self.least.get(record.method, 1.0), record.read_bytes)
        self._own[record.task, record.sample_id, record.method] = own

    def _keeps_all(self, record: Record, *, given: bool) -> Iterator[str]:
        slots = sum(record.kept_slots)
        if record.asked_bytes != record.full_bytes:
            yield f"{record.asked_bytes} bytes asked for, the whole cache has {record.full_bytes}"
        plain = ":" not in record.method  # another library's methods may drop channels
        if plain and record.kv_bytes < record.full_bytes * self.least.get(record.method, 1.0) * (1 - ROUNDING):
            yield f"{record.kv_bytes} bytes hold all tokens, the whole cache has {record.full_bytes}"
        read = None if record.method in self.choosing else record.read_bytes
        if plain and read is not None and read < record.full_bytes * self.least.get(record.method, 1.0):
            yield f"{read} bytes read of all tokens, the whole cache has {record.full_bytes}"
        if slots and not given:
            even = len(set(record.kept_slots)) == 1
            self._full[record.task, record.sample_id] = _Full(record.full_bytes, slots, even)

    def _is_given(self, record: Record, where: str, budget: int, like: str) -> Iterator[str]:
        tokens, least = record.compressed_tokens, self.least.get(record.method, 1.0)
        position, sample = POSITION_BYTES if record.stored_bytes else 0, (record.task, record.sample_id)
        sizes = (record.asked_bytes, record.kv_bytes, record.kept_slots)
        own = _Asked(where, sample, budget / tokens, *sizes, least, record.read_bytes, position, budget, like)
        self._asked.append(own)
        same = self._same.setdefault((budget, tokens, record.full_bytes), record.asked_bytes)
        if same != record.asked_bytes:
            yield f"{record.asked_bytes} bytes asked for, another record of the same budget has {same}"

    def across(self) -> Iterator[str]:
        """Say what does not fit the bytes of a slot that all records give, and what is no budget that another found.

        Bytes of slots are known of samples with a full cell.
        """
        yield from self._found()
        slots = {asked: _slot(asked, full) for asked in self._asked if (full := self._full.get(asked.sample))}
        if not slots:
            return
        usual = Counter(round(slot, 3) for slot in slots.values()).most_common(1)[0][0]
        for asked, slot in slots.items():
            full = self._full[asked.sample]
            if abs(slot - usual) > ROUNDING * usual + 1e-3:
                found = f"{slot:.1f} bytes a slot, elsewhere {usual:.1f}"
                yield f"{asked.where}: {asked.asked} bytes asked for make {found}"
                continue
            yield from _too_few(asked, full, usual, asked.position)
        for (task, name, _), own in self._own.items():
            whole = self._full.get((task, name))
            if whole is not None:
                yield from _too_few(own, whole, usual, POSITION_BYTES)

    def _found(self) -> Iterator[str]:
        """Say which budgets are not those that another method of the sample found."""
        for asked in self._asked:
            own = self._own.get((*asked.sample, asked.like))
            if own is None:
                continue
            if not own.stored <= asked.asked < own.stored + asked.asked / asked.slots:
                yield f"{asked.where}: {asked.asked} bytes asked for, {asked.like} stores {own.stored}"


def _too_few(own: _Asked | _Own, full: _Full, slot: float, position: int) -> Iterator[str]:
    """Say where kept slots take more bytes than are held, or than are read, which needs no positions.

    Those of a layer that is kept whole need none to be held. Nothing is said of layers that keep unlike numbers.
    """
    kept, windows = sum(own.kept), full.held - slot * full.slots
    whole = full.slots / max(1, len(own.kept))  # slots of a layer
    least, positions = windows + slot * own.least * kept, position * sum(n for n in own.kept if n < whole)
    slots = f"{own.where}: {kept} kept slots of {slot:.1f} bytes"
    if full.even and own.held < (least + positions) * (1 - ROUNDING):
        yield f"{slots} do not fit into {own.held} bytes"
    if full.even and own.read is not None and own.read < least * (1 - ROUNDING):
        yield f"{slots}, and {own.read} bytes are read"


def _slot(asked: _Asked, full: _Full) -> float:
    positions = asked.position * full.slots * asked.share
    return (full.held - asked.asked + positions) / (full.slots * (1 - asked.share))


def _own_problems(record: Record, *, budgeted: bool) -> Iterator[str]:
    """budgeted: whether its budget is of bytes that it holds."""
    held = record.stored_bytes or record.kv_bytes
    over = budgeted and held > OVER * record.asked_bytes
    if over != record.over_budget:
        told = "" if record.over_budget else "not "
        yield f"{held} bytes of {record.asked_bytes} asked for, and over_budget is {told}set"
    if record.stored_bytes and (held < record.kv_bytes or record.stored_bytes_end < record.kv_bytes_end):
        yield f"{held} bytes stored, {record.stored_bytes_end} at the end, less than live"
    if record.read_bytes is not None and not 0 < record.read_bytes <= record.kv_bytes:
        yield f"{record.read_bytes} bytes read for a token, of {record.kv_bytes} that are live"
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
