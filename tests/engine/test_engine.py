"""The engine: a cell alone computes what it computes in company, and what a Llama of plain loops computes."""

import copy
import re
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import pytest
import torch

from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.records.record import Record
from methods.base import KV, Budget, KVPolicy, LayerPolicy, LayerView, Needs, PromptView
from methods.coded import CodedPolicy
from methods.matryoshkakv import MatryoshkaKV
from methods.quest import Quest
from methods.recalkv import ReCalKV
from methods.registry import load_methods, make_policy
from methods.snapkv import SnapKV
from tests.engine.llama_loops import DIM, HEADS, LAYERS, Evict, Loops, Visible, decode_by_loops, prefilled

NEW = 7
SLOT = 2 * DIM * 4  # bytes of one slot of one head
SAME_BYTES = ("kv_bytes", "kv_bytes_end", "stored_bytes", "stored_bytes_end", "byte_steps", "asked_bytes", "full_bytes")
NONE, THIRD = frozenset[int](), frozenset(range(0, 261, 3))
NO_END = Limits(NEW, NONE)
ALIKE = re.compile("fp8@(e4m3|e5m2)|turboquant@(bits[24]|prod4)|gvote@p9[059]|recalkv@(cache|uniform)|kvzip@kvpress")
"""Presets whose numbers alone differ from another one's of their method, not what the engine does."""
LABELS = [
    label
    for name, entry in load_methods().items()
    if entry.policy.__module__.startswith("methods.")
    for label in (name, *(f"{name}@{preset}" for preset in entry.presets))
    if name != "q8_0"  # heads of the tiny model fill no block of it
    if not ALIKE.fullmatch(label)
]
CODED = (CodedPolicy, MatryoshkaKV, ReCalKV)
"""What a prompt leaves of them are codes or latents, not numbers."""
MODES = [("compressed", "aware"), ("prefill", "aware"), ("compressed", "agnostic")]
every_mode = pytest.mark.parametrize(("first_token", "query"), MODES)


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model), tiny.wording)


def make_prompt(tokens: int, limits: Limits = NO_END, seed: int = 0) -> Prompt:
    ids = torch.randint(5, 260, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt(ids, max(1, tokens * 3 // 4), (70, 80, 90, 100), limits)


def cell(label: str | KVPolicy, budget: int) -> Cell:
    policy = make_policy(label) if isinstance(label, str) else label
    return Cell(policy, Budget(tokens=budget) if policy.budgeted else None)


def ok(outcomes: list[Outcome]) -> list[Outcome]:
    assert [(o.status, o.error) for o in outcomes] == [("ok", None)] * len(outcomes)
    return outcomes


@dataclass(frozen=True)
class Ragged(LayerPolicy):
    """Another random set for each layer and head, of another size: none at all up to twice the budget."""

    seed: int = 0

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        draw = torch.Generator().manual_seed(self.seed * 100 + view.index)
        slots = torch.full((1, HEADS, 2 * budget), -1)
        for head in range(HEADS):
            size = 0 if (view.index, head) == (1, 0) else int(torch.randint(1, 2 * budget, (1,), generator=draw))
            slots[0, head, :size] = torch.randperm(view.tokens, generator=draw)[:size]
        return view.kv.take(slots)


def by_loops(
    engine: Engine, asked: Cell, prompt: Prompt, evict: Evict | None = None, in_cache: bool = False
) -> Outcome:
    """A cell computed by loops: of the policy only the positions it keeps are taken."""
    border = prompt.context if engine.query == "agnostic" else len(prompt.ids)
    budget = asked.budget.resolve(border) if asked.budget else border
    kept = asked.policy.compress(engine.prefill(prompt.ids[:border], asked.policy.needs).view, budget)
    with torch.no_grad():
        loops, first = prefilled(engine.model.model, tuple(prompt.ids[:border]))
        start = border - 1 if engine.again else border
        visible = [[{p for p in head if 0 <= p < start} for head in kv.positions[0].tolist()] for kv in kept]
        held = (replace(loops, in_cache=in_cache), visible)
        return decode_by_loops(held, start, prompt, first if start == len(prompt.ids) else None, evict)


def same(found: Outcome, gold: Outcome) -> None:
    assert found.nll_per_token == pytest.approx(gold.nll_per_token, abs=1e-4)
    assert found.token_ids == gold.token_ids


STATIC = ["fullkv", "snapkv@kvcf", "pyramidkv", "h2o", "streamingllm", "random", "compilerkv"]


@every_mode
def test_cells_compute_what_loops_over_kept_tokens_compute(model: AttachedModel, first_token: Any, query: Any) -> None:
    prompt = make_prompt(40)
    engine = Engine(model, query=query, first_token=first_token)
    cells = [*(cell(label, 12) for label in STATIC), cell(Ragged(), 5), cell(Ragged(seed=1), 9)]
    for asked, found in zip(cells, ok(engine.run(prompt, cells)), strict=True):
        same(found, by_loops(engine, asked, prompt))


def oldest(sinks: int, budget: int) -> Evict:
    def evict(loops: Loops, visible: Visible, position: int) -> None:
        for seen in (head for layer in visible for head in layer):
            while len(seen) > budget:
                seen.remove(min(at for at in seen if at >= sinks))

    return evict


def least_attended(slots: int) -> Evict:
    def evict(loops: Loops, visible: Visible, position: int) -> None:
        recent = position - (slots - slots // 2)
        for layer, heads in enumerate(visible):
            for head, seen in enumerate(heads):
                if len(seen) > slots:
                    old = [at for at in seen if at <= recent]
                    seen.remove(min(old, key=lambda at: loops.sums[layer, head, at]))

    return evict


@every_mode
def test_eviction_while_decoding_is_that_of_loops(model: AttachedModel, first_token: Any, query: Any) -> None:
    prompt = make_prompt(20, Limits(24, frozenset()), seed=3)
    engine = Engine(model, query=query, first_token=first_token)
    sizes = (11, 4, 3)
    cells = [cell("streamingllm@reassign", 9), cell("streamingllm@paper", 9), *(cell("h2o@paper", n) for n in sizes)]
    reassigned, sinks, *heavy = ok(engine.run(prompt, cells))
    same(reassigned, by_loops(engine, cells[0], prompt, in_cache=True))
    same(sinks, by_loops(engine, cells[1], prompt, oldest(4, 9), in_cache=True))
    assert sinks.kv_bytes == sinks.kv_bytes_end == sinks.asked_bytes == 9 * LAYERS * HEADS * (SLOT + 4)
    for size, asked, outcome in zip(sizes, cells[2:], heavy, strict=True):
        slots = size * (SLOT + 4) // (SLOT + 8)
        same(outcome, by_loops(engine, asked, prompt, least_attended(slots)))
        assert outcome.kv_bytes_end == outcome.kv_bytes == slots * LAYERS * HEADS * (SLOT + 8) <= outcome.asked_bytes


def bounds_of_new_pages(policy: KVPolicy, tokens: int, more: int) -> int:
    """Bytes of the lowest and highest keys of pages that begin with one of `more` tokens after `tokens`."""
    if not isinstance(policy, Quest):
        return 0
    pages = -(-(tokens + more) // policy.page) - -(-tokens // policy.page)
    return pages * (LAYERS - policy.skip) * HEADS * SLOT


@pytest.mark.parametrize(
    ("first_token", "query", "eos"), [(*mode, eos) for mode, eos in zip(MODES, (THIRD, NONE, THIRD), strict=True)]
)
def test_a_cell_alone_computes_what_it_computes_in_company(
    model: AttachedModel, first_token: Any, query: Any, eos: frozenset[int]
) -> None:
    """With a third of all tokens ending a text, rows end at different steps and are taken out of the batch."""
    engine = Engine(model, query=query, first_token=first_token)
    prompt = make_prompt(44, Limits(NEW, eos), seed=1)
    cells = [*(cell(label, 16) for label in LABELS), cell(Ragged(), 8), *(cell("snapkv@kvcf", n) for n in (1, 5, 30))]
    shared = ok(engine.run(prompt, cells))
    assert len({outcome.prefill_s for outcome in shared}) == 1
    assert len({outcome.token_ids for outcome in shared}) > 5
    for asked, together in zip(cells, shared, strict=True):
        alone = ok(engine.run(prompt, [asked]))[0]
        same(alone, together)
        for name in (*SAME_BYTES, "kept_slots", "notes"):
            assert getattr(alone, name) == getattr(together, name)
        assert alone.decode_rows == 1
        if not asked.policy.evicts_while_decoding:
            fed = len(together.token_ids) - (len(together.token_ids) == NEW)
            fed += len(prompt.ids) - prompt.context if query == "agnostic" else 0
            more = together.kv_bytes_end - together.kv_bytes - fed * LAYERS * HEADS * SLOT
            more -= bounds_of_new_pages(asked.policy, prompt.context if query == "agnostic" else len(prompt.ids), fed)
            slots = -(-more // SLOT)  # a last token that was kept gives its position up
            again = (first_token, query) == ("compressed", "aware")  # a last token that was not kept comes back
            coded = isinstance(asked.policy, CODED)  # what comes later, too
            assert (coded or slots >= 0) and slots <= again * LAYERS * HEADS
            assert slots == 0 or not getattr(asked.policy, "recent", 0)


@dataclass(frozen=True)
class Nudged(SnapKV):
    """SnapKV with one number among its last layer's values changed."""

    by: float = 0.0

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        *kept, last = super().compress(view, budget)
        values = last.values.clone()
        values[0, 0, 0, 0] += self.by
        return [*kept, replace(last, values=values)]


@every_mode
def test_equal_caches_are_decoded_once(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch, first_token: Any, query: Any
) -> None:
    """Beside another budget, another number, codes, and rows that evict while they decode."""
    rows, of = list[int](), Decoding.of
    monkeypatch.setattr(Decoding, "of", lambda model, own, **more: rows.append(len(own)) or of(model, own, **more))
    engine, prompt = Engine(model, query=query, first_token=first_token), make_prompt(44)
    equal = [cell("snapkv", 16), cell(Nudged(), 16)]
    others = [cell("snapkv", 15), cell(Nudged(by=1.0), 16), cell("quant", 40), cell("quant", 41)]
    evicting = [cell("h2o@paper", 16), cell("h2o@paper", 16)]
    cells = [equal[0], *others, *evicting, equal[1]]
    shared = ok(engine.run(prompt, cells))
    assert rows == [1 + len(others), len(evicting)]
    assert [outcome.decode_rows for outcome in shared] == [6, 6, 6, 6, 6, 2, 2, 6]
    for asked, together in zip(cells, shared, strict=True):
        alone = ok(engine.run(prompt, [asked]))[0]
        same(alone, together)
        assert all(getattr(alone, name) == getattr(together, name) for name in SAME_BYTES)


def test_questions_over_one_context_are_answered_as_if_each_were_alone(model: AttachedModel) -> None:
    engine = Engine(model, query="agnostic")
    first = make_prompt(40)
    others = [replace(first, ids=[*first.ids[:30], *range(start, start + size)]) for start, size in ((80, 4), (90, 12))]
    prompts = [first, *others]
    cells = [cell(label, 9) for label in LABELS]
    wanted = [cells, cells[1::2], cells[::2][::-1]]
    together = engine.run_group(prompts, wanted)
    assert len({outcome.prefill_s for outcomes in together for outcome in outcomes}) == 1
    for prompt, own, outcomes in zip(prompts, wanted, together, strict=True):
        for asked, found in zip(own, ok(outcomes), strict=True):
            alone = ok(engine.run(prompt, [asked]))[0]
            same(alone, found)
            assert all(getattr(alone, name) == getattr(found, name) for name in SAME_BYTES)
    assert len({outcomes[-1].token_ids for outcomes in (together[0], together[1])}) == 2
    with pytest.raises(HarnessError, match="2 prompts of one group differ in their first 30 tokens"):
        engine.run_group([first, make_prompt(40, seed=9)], [cells, cells])


@every_mode
def test_kept_needle_tokens_are_counted_per_layer_and_head(model: AttachedModel, first_token: Any, query: Any) -> None:
    prompt = replace(make_prompt(40), needle=(0, 3, 17, 29))
    engine = Engine(model, query=query, first_token=first_token)
    tokens = 30 if query == "agnostic" else 40
    found = ok(engine.run(prompt, [cell("fullkv", 1), cell("streamingllm", 16), cell(Ragged(), 9)]))
    assert found[0].needle_kept == ((4,) * HEADS,) * LAYERS
    recent = tokens - 12  # 4 sinks and the last 12
    held = sum(at < 4 or at >= recent for at in prompt.needle)
    assert found[1].needle_kept == ((held,) * HEADS,) * LAYERS
    view = engine.prefill(prompt.ids[:tokens], Needs()).view
    kept = Ragged().compress(view, 9)
    by_hand = [[len(set(kv.positions[0, h].tolist()) & {0, 3, 17, 29}) for h in range(HEADS)] for kv in kept]
    assert [list(heads) for heads in found[2].needle_kept] == by_hand
    assert engine.run(replace(prompt, needle=()), [cell("fullkv", 1)])[0].needle_kept == ()


@every_mode
def test_marked_tokens_are_kept_and_a_span_over_the_budget_is_skipped(
    model: AttachedModel, first_token: Any, query: Any
) -> None:
    prompt = replace(make_prompt(40), needle=(0, 3, 17, 29, 35), protected=(0, 3, 17, 29, 35))
    engine = Engine(model, query=query, first_token=first_token)
    held = sum(at < (30 if query == "agnostic" else 40) for at in prompt.protected)
    plain, kept, small = engine.run(prompt, [cell("snapkv", 12), cell("protect@snapkv", 12), cell("protect@tova", 4)])
    ok([plain, kept])
    assert kept.needle_kept == ((held,) * HEADS,) * LAYERS != plain.needle_kept
    assert (kept.kv_bytes, kept.kept_slots) == (plain.kv_bytes, plain.kept_slots)
    assert small.status == "skipped" and f"budget 4 leaves no slot beside the {held} protected" in str(small.error)


@pytest.mark.parametrize(
    ("tokens", "first_token", "query"),
    [(tokens, *mode) for tokens, mode in zip((2, 5, 9, 2), (*MODES, MODES[2]), strict=True)],
)
def test_prompts_shorter_than_every_window(model: AttachedModel, tokens: int, first_token: Any, query: Any) -> None:
    engine, prompt = Engine(model, query=query, first_token=first_token), make_prompt(tokens)
    for label in LABELS:
        outcome = engine.run(prompt, [cell(label, 1)])[0]
        policy = make_policy(label)
        short = prompt.context <= 1 and query == "agnostic" and policy.budgeted
        ranks_end = isinstance(policy, (MatryoshkaKV, ReCalKV)) and outcome.status == "skipped"
        if ranks_end and not short:
            assert re.match("budget 1 is below (an eighth of|one latent)", str(outcome.error))
            continue
        assert (outcome.status, outcome.error is None) == (("skipped", False) if short else ("ok", True)), outcome.error


def test_log_probabilities_of_the_window(model: AttachedModel, tiny: LoadedModel) -> None:
    ids = make_prompt(20).ids
    logprobs = tiny.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = torch.tensor([logprobs[at - 1, ids[at]].item() for at in range(1, 20)])
    for window in (1, 8, 19, 64):
        found = Engine(model).prefill(ids, Needs(window=window, logprobs=True)).view.logprobs
        assert found is not None
        torch.testing.assert_close(found, own[-window:].unsqueeze(0), atol=1e-4, rtol=1e-4)
    alone = Engine(model).prefill(ids[:1], Needs(window=8, logprobs=True)).view.logprobs
    assert alone is not None and alone.shape == (1, 0)
    assert Engine(model).prefill(ids, Needs(window=8)).view.logprobs is None


def test_an_outcome_is_stored_under_a_record_s_own_names() -> None:
    """Nothing of an outcome is left out or spelled differently, so that one number has one name."""
    stored = Outcome(nll_per_token=(1.0, 2.5)).stored()
    assert set(stored) <= set(Record.model_fields)
    assert (stored["nll"], stored["nll_tokens"], stored["nll_first"]) == (1.75, 2, 1.0)
    assert Outcome().stored()["nll"] is None
    own, theirs = get_type_hints(Outcome), get_type_hints(Record)
    assert {name: kind for name, kind in own.items() if theirs.get(name) != kind} == {
        "nll_per_token": tuple[float, ...]
    }
