"""Quest against plain loops written from the paper's formula, in the layer cache that reads by it."""

import math

import pytest
import torch
from torch import Tensor

from harness.contract import make_view
from harness.engine.packed import survey
from harness.engine.paged_rows import PagedRows
from methods.base import KV, Needs, PolicyError, Sizes
from methods.pages import PagedKV
from methods.registry import make_policy
from methods.views import Form

HEADS, GROUP, DIM, PAGE = 2, 3, 8, 4
SCALE = DIM**-0.5


def kept(tokens: int, **params: object) -> list[KV]:
    view = make_view(tokens, Needs(), dim=DIM)
    return make_policy("quest", {"page": PAGE, "least": 1, **params}).compress(view, 2 * PAGE)


def chosen(query: list[float], keys: list[list[float]], count: int) -> set[int]:
    """The tokens of the pages with the highest bound, the last page's among them."""
    pages = [list(range(at, min(at + PAGE, len(keys)))) for at in range(0, len(keys), PAGE)]
    bounds = []
    for page in pages:
        low = [min(keys[t][d] for t in page) for d in range(DIM)]
        high = [max(keys[t][d] for t in page) for d in range(DIM)]
        bounds.append(sum(max(q * lo, q * hi) for q, lo, hi in zip(query, low, high, strict=True)))
    order = sorted(range(len(pages) - 1), key=lambda at: -bounds[at])[: count - 1]
    return {token for at in [*order, len(pages) - 1] for token in pages[at]}


def loop(query: list[float], keys: list[list[float]], values: list[list[float]], tokens: set[int]) -> list[float]:
    """Softmax attention of one query over some tokens."""
    logits = {t: SCALE * sum(q * k for q, k in zip(query, keys[t], strict=True)) for t in tokens}
    weights = {t: math.exp(logit - max(logits.values())) for t, logit in logits.items()}
    return [sum(w * values[t][d] for t, w in weights.items()) / sum(weights.values()) for d in range(DIM)]


def rows_of(kvs: list[KV], position: int) -> PagedRows:
    return PagedRows(kvs, position=position, room=None, known=survey(kvs, position, [False] * len(kvs)))


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_read_is_that_of_a_plain_loop_while_pages_grow(shared: bool) -> None:
    tokens, draw = 30, torch.Generator().manual_seed(3)
    kv = kept(tokens, shared=shared, skip=0)[1]
    rows, slot, read = rows_of([kv], tokens), 2 * DIM * 4, []
    keys, values = kv.keys.clone(), kv.values.clone()
    for _ in range(9):  # the last page is filled, and two more begin
        k, v = (torch.randn(1, HEADS, 1, DIM, generator=draw) for _ in range(2))
        queries = torch.randn(1, HEADS * GROUP, 1, DIM, generator=draw)
        rows.append(k, v)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        wanted, union = [], 0
        for head in range(HEADS):
            own, of = keys[0, head].tolist(), values[0, head].tolist()
            asked = queries[0, head * GROUP : (head + 1) * GROUP, 0].tolist()
            picked = [shared_pages(asked, own)] * GROUP if shared else [chosen(query, own, 2) for query in asked]
            wanted += [loop(query, own, of, some) for query, some in zip(asked, picked, strict=True)]
            union += len(set().union(*picked))
        read.append(union * slot)
        torch.testing.assert_close(rows.attend(queries, Form(SCALE))[0, :, 0], torch.tensor(wanted))
    bounds = 2 * HEADS * math.ceil(tokens / PAGE) * DIM * 4
    assert rows.read_bytes(0) == sum(read) // 9 + bounds
    if shared:  # a whole page and the last one
        assert read == [slot * HEADS * (PAGE + (tokens + n) % PAGE + 1) for n in range(9)]
    else:
        assert max(read) > slot * HEADS * 2 * PAGE


def shared_pages(asked: list[list[float]], keys: list[list[float]]) -> set[int]:
    """The pages whose highest bound over the group's queries is highest: the last one and another."""
    last = (len(keys) - 1) // PAGE * PAGE
    starts = range(0, last, PAGE)

    def bound(query: list[float], at: int) -> float:
        page = keys[at : at + PAGE]
        return sum(max(q * min(k[d] for k in page), q * max(k[d] for k in page)) for d, q in enumerate(query))

    best = max(starts, key=lambda at: max(bound(query, at) for query in asked))
    return {*range(best, best + PAGE), *range(last, len(keys))}


def test_a_rewound_row_reads_as_if_nothing_had_come() -> None:
    kv = kept(21, skip=0)[0]
    draw = torch.Generator().manual_seed(5)

    def step(rows: PagedRows, seed: int) -> Tensor:
        own = torch.Generator().manual_seed(seed)
        k, v, q = (torch.randn(1, n, 1, DIM, generator=own) for n in (HEADS, HEADS, HEADS * GROUP))
        rows.append(k, v)
        return rows.attend(q, Form(SCALE))

    one, other = rows_of([kv], 21), rows_of([kv], 21)
    mark, stored = one.mark(), one.stored
    for _ in range(20):
        step(one, int(torch.randint(1000, (), generator=draw)))
    one.rewind(mark)
    assert one.stored == stored == other.stored and one.nbytes(0) == other.nbytes(0)
    assert all(torch.equal(step(one, seed), step(other, seed)) for seed in range(6))


def test_rows_of_several_budgets_compute_what_each_does_alone() -> None:
    kvs = [kept(40, skip=0)[2], kept(40, skip=3)[2], kept(40, skip=0, shared=True)[2]]
    assert [isinstance(kv, PagedKV) for kv in kvs] == [True, False, True]
    together, alone = rows_of(kvs, 40), [rows_of([kv], 40) for kv in kvs]
    draw = torch.Generator().manual_seed(9)
    for _ in range(3):
        k, v, q = (torch.randn(1, n, 1, DIM, generator=draw) for n in (HEADS, HEADS, HEADS * GROUP))
        together.append(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
        found = together.attend(q.expand(3, -1, -1, -1), Form(SCALE))
        for i, row in enumerate(alone):
            row.append(k, v)
            assert torch.equal(found[i : i + 1], row.attend(q, Form(SCALE)))
    told = [together.read_bytes(i) for i in range(3)]
    assert told == [row.read_bytes(0) for row in alone] and told[1] is None
    together.keep([0, 2])
    assert [together.read_bytes(i) for i in range(2)] == [told[0], told[2]]
    assert [together.nbytes(i) for i in range(2)] == [alone[0].nbytes(0), alone[2].nbytes(0)]


@pytest.mark.parametrize("form", [Form(SCALE, softcap=5.0), Form(SCALE, sinks=torch.randn(1, HEADS, GROUP))])
def test_pages_hide_the_others_where_a_form_has_no_kernel(form: Form) -> None:
    """With a page for every token that is read, the rest may hold anything."""
    kv = kept(24, skip=0)[0]
    rows, draw = rows_of([kv], 24), torch.Generator().manual_seed(2)
    k, v, q = (torch.randn(1, n, 1, DIM, generator=draw) for n in (HEADS, HEADS, HEADS * GROUP))
    rows.append(k, v)
    row, outs = rows.rows[0], []
    assert row.pages is not None
    hidden = ~row.chosen(q, row.pages).any(dim=1)  # [H, S]
    assert hidden.any()
    for _ in range(2):
        outs.append(rows.attend(q, form))
        row.values[:, :, : row.used][:, hidden] = 1e4
    assert torch.equal(*outs)


def test_bytes_read_are_the_budgets_tokens_and_the_bounds() -> None:
    tokens, budget = 96, 48
    kvs = make_policy("quest").compress(make_view(tokens, Needs(), dim=DIM), budget)
    assert [isinstance(kv, PagedKV) for kv in kvs] == [False, False, True, True]
    slot, bounds = 2 * DIM * 4, 2 * HEADS * (tokens // 16) * DIM * 4
    assert kvs[0].reads(HEADS * tokens) == HEADS * tokens * slot
    assert kvs[2].reads(HEADS * tokens) == HEADS * budget * slot + bounds
    assert kvs[2].nbytes == HEADS * tokens * (slot + 4) + bounds


def test_few_tokens_are_three_pages_and_the_record_says_so() -> None:
    policy = make_policy("quest")
    [*_, kv] = policy.compress(make_view(96, Needs(), dim=DIM), 16)
    assert kv.reads(HEADS * 96) == HEADS * 48 * 2 * DIM * 4 + 2 * HEADS * 6 * DIM * 4
    assert policy.notes(48, Sizes(96, 4, 6, 2)) == ()
    assert "3 pages of 16 tokens, more than its budget of 16" in policy.notes(16, Sizes(96, 4, 6, 2))[0]
    for name, value in {"page": 0, "least": 0, "skip": -1}.items():
        with pytest.raises(PolicyError, match=f"{name}={value}"):
            make_policy("quest", {name: value})
