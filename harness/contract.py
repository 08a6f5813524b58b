"""The contract of a method, clause by clause, for the tests of its author: `check_method("mine@paper")`.

Every clause is tried on random prompts of several lengths at budgets below and above them.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import FrozenInstanceError, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import HarnessError
from methods.base import KV, KVPolicy, LayerPolicy, LayerView, Needs, PromptView, Sizes
from methods.budget import BudgetTooSmall
from methods.label import MethodLabel
from methods.registry import METHODS, make_policy
from methods.repeat import Repeated
from methods.stored import CodedKV
from methods.views import POSITION_BYTES, Form

LAYERS, HEADS, GROUP, DIM = 4, 2, 3, 32  # a block of every code
PLAIN = 2 * DIM * 4 + POSITION_BYTES  # bytes of a slot
LENGTHS = (2, 17, 50, 90)
BUDGETS = (1, 2, 3, 5, 9, 20, 33, 64)
LARGE = 300.0  # factor of queries and keys whose products float16 cannot hold
aten = torch.ops.aten
RANKING = {aten.topk, aten.sort, aten.argsort, aten.argmax, aten.argmin, aten.max, aten.min, aten.kthvalue, aten.view}
RANKING |= {aten.gt, aten.ge, aten.lt, aten.le}

CLAUSES: dict[str, Callable[[str], None]] = {}
"""Every clause by name: a function of a method's label that raises BrokenContract."""


class BrokenContract(HarnessError):
    """A method broke `clause`; the message names both, and the values seen."""

    def __init__(self, label: str, clause: str, seen: str) -> None:
        super().__init__(f"method {label} breaks the contract, clause {clause}: {seen}")
        self.label, self.clause = label, clause


def check_method(label: str, *, without: Collection[str] = ()) -> None:
    """Hold a registered method, `name` or `name@preset`, to every clause.

    without: clauses that it does not keep to by design, such as `keys_are_the_prompts` for one that turns keys. Raises
    BrokenContract with the clause's name and what was seen; PolicyError for an unknown label, HarnessError for an
    unknown clause.
    """
    make_policy(label)
    if unknown := sorted(set(without) - set(CLAUSES)):
        raise HarnessError(f"unknown clause {unknown[0]!r}; known: {', '.join(CLAUSES)}")
    for name, hold in CLAUSES.items():
        if name not in without:
            hold(label)


def make_view(tokens: int, needs: Needs, *, dim: int = DIM, dtype: torch.dtype = torch.float32) -> PromptView:
    """Make a random prompt of 4 layers and 2 KV heads of 3 query heads, with what `needs` declares."""
    draw = torch.Generator().manual_seed(tokens)
    layers = []
    for index in range(LAYERS):
        keys, values = (torch.randn(1, HEADS, tokens, dim, generator=draw).to(dtype) for _ in range(2))
        queries = torch.randn(1, HEADS * GROUP, min(needs.window, tokens), dim, generator=draw).to(dtype)
        sums = torch.rand(1, HEADS, GROUP, tokens, generator=draw) if needs.column_sums else None
        kv = KV(keys, values, torch.arange(tokens, dtype=torch.int32).expand(1, HEADS, tokens))
        module = _attention(dim, draw, dtype) if needs.module else None
        seen = {asked: _repeated(tokens, draw) for asked in sorted(needs.repeat, key=repr)}
        layers.append(LayerView(index, kv, queries, Form(dim**-0.5), sums, _turn, module=module, repeated=seen))
    own = -torch.rand(1, max(0, min(needs.window, tokens - 1)), generator=draw)
    return PromptView(layers, own if needs.logprobs else None)


def _attention(dim: int, draw: torch.Generator, dtype: torch.dtype) -> torch.nn.Module:
    """An attention of which there is the output projection, at random."""
    width = HEADS * GROUP * dim
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(width, width, bias=False, dtype=dtype)
    module.o_proj.weight = torch.nn.Parameter(torch.randn(width, width, generator=draw).to(dtype), requires_grad=False)
    return module


def _repeated(tokens: int, draw: torch.Generator) -> Repeated:
    """Of a prompt whose first three tokens and last one are the chat template's, where there are more."""
    start, end = min(3, tokens - 1), max(tokens - 1, 1)
    received = torch.zeros(1, HEADS, GROUP, tokens)
    received[..., start:end] = torch.rand(1, HEADS, GROUP, end - start, generator=draw)
    return Repeated(received, start, end)


def clause(flaws: Callable[[str], Iterator[str]]) -> Callable[[str], Iterator[str]]:
    """Add a clause under its function's name, in the order of this file. flaws: what is wrong with a method, if any."""
    name = flaws.__name__

    def hold(label: str) -> None:
        try:
            seen = next(flaws(label), None)
        except Exception as error:  # a method is foreign code: whatever it raises breaks the clause
            raise BrokenContract(label, name, f"raised {type(error).__name__}: {error}") from error
        if seen is not None:
            raise BrokenContract(label, name, seen)

    CLAUSES[name] = hold
    return flaws


@clause
def one_kv_a_layer(label: str) -> Iterator[str]:
    """`compress` returns one KV per layer, with keys, values and positions of one shape."""
    for *_, kvs, where in tried(label):
        if len(kvs) != LAYERS:
            yield f"{len(kvs)} KVs for {LAYERS} layers {where}"
        for kv in kvs:
            shapes = [list(x.shape[:3]) for x in (*kv.load(), kv.positions)]
            if not (shapes[0] == shapes[1] == shapes[2] and kv.positions.dtype == torch.int32):
                yield f"keys, values, int32 positions of {shapes} {where}"


@clause
def the_budget_is_kept(label: str) -> Iterator[str]:
    """Slots and bytes stay within the budget, on average over layers and heads.

    A method without one keeps all; one that finds its own, some. A budget that it calls too small is passed over.
    """
    for policy, view, budget, kvs, where in tried(label):
        live, held = sum(int(kv.live.sum()) for kv in kvs), sum(kv.nbytes for kv in kvs)
        asked = (budget if policy.budgeted else view.tokens) * LAYERS * HEADS
        if live == view.tokens * LAYERS * HEADS:
            held -= live * POSITION_BYTES  # those of all tokens go without saying
        if policy.reads_a_part:
            if live != view.tokens * LAYERS * HEADS:
                yield f"{live} of {view.tokens * LAYERS * HEADS} slots of a method that reads a part of all {where}"
            continue
        side = budget == 1 and any(kv.extra for kv in kvs)  # one slot always stays, whatever its side data
        coded = any(type(kv) is not KV for kv in kvs)  # more slots may fit into the same bytes
        kept = live > 0 and (live <= asked or coded) and (held <= asked * PLAIN or side)
        if not (kept and (policy.kind != "whole" or live == asked)):
            yield f"{live} slots, {held} bytes where {asked} slots of {PLAIN} bytes were asked {where}"


@clause
def bytes_are_those_of_live_slots(label: str) -> Iterator[str]:
    """`KV.nbytes` is what the live slots and their side data take; that of a subclass, which may code them, no more."""
    for *_, kvs, where in tried(label):
        for kv in kvs:
            expected = int((kv.positions >= 0).sum()) * PLAIN + sum(x.nbytes for x in kv.extra.values())
            if not (kv.nbytes == expected if type(kv) is KV else 0 < kv.nbytes <= expected):
                yield f"nbytes {kv.nbytes}, {expected} counted {where}"


@clause
def positions_ascend(label: str) -> Iterator[str]:
    """Every slot names a token of the prompt, each at most once, in order; -1 is an empty slot."""
    for _, view, budget, kvs, _ in tried(label):
        for kept in (head for kv in kvs for head in kv.positions[0].tolist()):
            own = [p for p in kept if p >= 0]
            if own != sorted(set(own)) or not set(kept) <= set(range(-1, view.tokens)):
                yield f"positions {kept} of {view.tokens} tokens, budget {budget}"


@clause
def values_are_the_prompts(label: str) -> Iterator[str]:
    """A slot that is no code loads the value of the token that it names."""
    yield from _differing(label, 1, "value")


@clause
def keys_are_the_prompts(label: str) -> Iterator[str]:
    """A slot that is no code loads the key of the token that it names."""
    yield from _differing(label, 0, "key")


@clause
def compression_is_repeatable(label: str) -> Iterator[str]:
    """The same prompt and budget give the same, whatever other budgets were asked for before."""
    policy = make_policy(label)
    for tokens in (17, 70):
        view = make_view(tokens, policy.needs)
        for budget in (16, 1, 16):
            alone = left(policy, make_view(tokens, policy.needs), budget)
            for a, b in zip(left(policy, view, budget), alone, strict=True):
                if a.extra.keys() != b.extra.keys() or not all(map(torch.equal, _tensors(a), _tensors(b))):
                    seen = f"two answers to {tokens} tokens at budget {budget}"
                    yield f"{seen}: {a.positions.tolist()}, {b.positions.tolist()}"


@clause
def what_is_ranked_are_numbers(label: str) -> Iterator[str]:
    """Nothing that is sorted or compared is NaN, in half precision with large queries and keys either."""
    policy = make_policy(label)
    for dtype, factor in ((torch.float32, 1.0), (torch.float16, LARGE)):
        view = make_view(70, policy.needs, dtype=dtype)
        for layer in view.layers:
            layer.kv.keys *= factor
            layer.queries *= factor
        with _Watch() as watch:  # type: ignore[no-untyped-call]
            policy.compress(view, 16)
        if watch.seen:
            yield f"{watch.seen} of NaN (70 tokens, budget 16, {dtype}, queries and keys times {factor:g})"


@clause
def the_prompt_is_left_alone(label: str) -> Iterator[str]:
    """Neither compressing nor writing into what it returned changes the view."""
    policy = make_policy(label)
    for tokens in (17, 70):
        view = make_view(tokens, policy.needs)
        before = [x.clone() for x in _shown(view)]
        kept = policy.compress(view, 16)
        if policy.budgeted and not policy.reads_a_part:
            for kv in kept:
                kv.keys.zero_(), kv.values.zero_(), kv.positions.fill_(-1)
        if not all(map(torch.equal, before, _shown(view))):
            yield f"a view of {tokens} tokens changed; return copies (`kv.take`)"


@clause
def a_whole_prompt_is_kept(label: str) -> Iterator[str]:
    """A budget of the whole prompt, or more, loses nothing."""
    policy = make_policy(label)
    if policy.kind == "own":
        return  # it is given none
    view = make_view(12, policy.needs)
    for budget in (12, 40):
        for live in (kv.live.tolist() for kv in policy.compress(view, budget)):
            if live != [[12] * HEADS]:
                yield f"{live} of 12 slots at budget {budget}"


@clause
def policies_are_frozen_values(label: str) -> Iterator[str]:
    """A policy is a frozen, hashable dataclass: two made alike are equal."""
    policy, other = make_policy(label), make_policy(label)
    if policy != other or hash(policy) != hash(other):
        yield f"{policy} and {other} are not equal"
    for field in fields(policy):  # type: ignore[arg-type]
        try:
            setattr(policy, field.name, getattr(policy, field.name))
        except FrozenInstanceError:
            continue
        yield f"{field.name} can be set; add @dataclass(frozen=True)"


@clause
def layer_budgets_fit(label: str) -> Iterator[str]:
    """Budgets of single layers sum to at most the budget of all, and notes are text."""
    policy = make_policy(label)
    for budget, tokens in ((16, 100), (3, 9)):
        notes = policy.notes(budget, Sizes(tokens, LAYERS, HEADS * GROUP, HEADS))
        if not all(isinstance(note, str) for note in notes):
            yield f"notes {notes}"
        if policy.budgeted and isinstance(policy, LayerPolicy):
            own = policy.layer_budgets(budget, tokens, LAYERS)
            if len(own) != LAYERS or sum(own) > budget * LAYERS:
                yield f"layer budgets {own} at a budget of {budget}"


@clause
def a_method_says_what_it_is(label: str) -> Iterator[str]:
    """The class has a docstring whose first line is a sentence; `paper` is an address or `control, no paper`."""
    entry = METHODS.get(MethodLabel.parse(label).name)
    if entry is None:
        return  # a label with a prefix: made by a resolver, not registered
    if not entry.summary.endswith("."):
        yield f"first line of the docstring {entry.summary!r}; end it with '.'"
    if not entry.paper.startswith("https://") and entry.paper != "control, no paper":
        yield f"paper {entry.paper!r}; give its address or 'control, no paper'"


@cache
def tried(label: str) -> list[tuple[KVPolicy, PromptView, int, list[KV], str]]:
    """Return the method on prompts of several lengths, at every budget below the length, and where that was, in words.

    Clauses only read them.
    """
    policy = make_policy(label)
    views = [make_view(tokens, policy.needs) for tokens in LENGTHS]
    asked = [(view, budget) for view in views for budget in (*BUDGETS, view.tokens - 1) if budget < view.tokens]
    found = [(policy, view, n, left(policy, view, n), f"({view.tokens} tokens, budget {n})") for view, n in asked]
    return [own for own in found if own[3]]


def left(policy: KVPolicy, view: PromptView, budget: int) -> list[KV]:
    """Return what a method leaves of a prompt; nothing where it cannot serve so small a budget."""
    try:
        return policy.compress(view, budget)
    except BudgetTooSmall:
        return []


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that ranks numbers of which some are NaN. seen: its name."""

    seen = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args[0] if args and func.overloadpacket in RANKING else None
        if not self.seen and isinstance(given, Tensor) and bool(given.isnan().any()):
            self.seen = func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def _differing(label: str, part: int, what: str) -> Iterator[str]:
    """Where a slot does not hold what the prompt has there. part: 0 for keys, 1 for values, as `KV.load` gives them."""
    for _, view, _, kvs, where in tried(label):
        for layer, kv in zip(view.layers, kvs, strict=True):
            own, prompt = kv.load()[part], layer.kv.load()[part]  # [1, H, S, D] and [1, H, T, D]
            source = prompt.gather(2, kv.positions.clamp(min=0).long().unsqueeze(-1).expand(own.shape))
            wrong = sorted(set(kv.positions[(own != source).any(dim=-1) & _plain(kv)].tolist()))
            if wrong:
                yield f"positions whose {what} differs: {wrong} {where}"


def _plain(kv: KV) -> Tensor:
    """Slots that hold a token as it is: [1, H, S] bool. Codes, which come first in a head, stand for it as they can."""
    there = kv.positions >= 0
    if not isinstance(kv, CodedKV):
        return there
    return there & (torch.arange(there.shape[2]) >= torch.tensor(kv.counts).unsqueeze(1))


def _tensors(kv: KV) -> list[Tensor]:
    """Everything that a KV holds: positions, keys and values as attention reads them, and side data by name."""
    return [kv.positions, *kv.load(), *(kv.extra[name] for name in sorted(kv.extra))]


def _shown(view: PromptView) -> list[Tensor]:
    """Every tensor of a view."""
    shown = [view.logprobs]
    for layer in view.layers:
        shown += [layer.kv.keys, layer.kv.values, layer.kv.positions, layer.queries, layer.column_sums]
    return [x for x in shown if x is not None]


def _turn(keys: Tensor, by: int | Tensor) -> Tensor:
    """A rotation of every pair of dimensions, as RoPE is."""
    half = keys.shape[-1] // 2
    angle = (by.unsqueeze(-1) if isinstance(by, Tensor) else by) / 10 ** torch.arange(half)
    first, second = keys[..., :half], keys[..., half:]
    cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
