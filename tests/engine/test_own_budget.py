"""Methods of their own budget, and others that are given what these kept of the same prompt."""

import copy
from dataclasses import dataclass, replace

import pytest

import harness.engine.engine
import harness.engine.turns
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import AsKept, Cell, Limits, NextTurn
from harness.models.load import LoadedModel
from methods.base import KV, Kind, KVPolicy, PromptView
from methods.registry import make_policy
from tests.engine.llama_loops import HEADS, LAYERS
from tests.engine.test_engine import SLOT, Ragged, make_prompt, ok

TOKENS = 60
POSITION = 4


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model))


@dataclass(frozen=True)
class Found(KVPolicy):
    """What a random budget leaves, another in each head; or all, or an error."""

    slots: int = 10
    fails: bool = False

    @property
    def kind(self) -> Kind:
        return "own"

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        assert budget == view.tokens
        if self.fails:
            raise ValueError("broken")
        if self.slots >= budget:
            return [layer.kv for layer in view.layers]
        return Ragged().compress(view, self.slots)


def pair(own: KVPolicy, label: str = "snapkv") -> Cell:
    return Cell(make_policy(label), None, AsKept(own, "found"))


def test_another_method_is_given_the_least_slots_of_no_fewer_bytes(model: AttachedModel) -> None:
    rounded = set()
    for slots in range(6, 20):
        own = Found(slots)
        alone, rival = ok(Engine(model).run(make_prompt(TOKENS), [Cell(own, None), pair(own)]))
        kept = sum(alone.kept_slots)
        assert (alone.budget_tokens, alone.asked_bytes) == (None, alone.stored_bytes) and not alone.over_budget
        assert rival.budget_tokens == -(-kept // (LAYERS * HEADS))
        assert 0 <= rival.stored_bytes - alone.stored_bytes < LAYERS * HEADS * (SLOT + POSITION)
        rounded.add(kept % (LAYERS * HEADS) > 0)
    assert True in rounded


def test_a_pair_alone_is_what_it_is_in_company(model: AttachedModel) -> None:
    own, prompt = Found(), make_prompt(TOKENS)
    rival, given = pair(own), pair(own, "quant@snapkv-int4")
    together = ok(Engine(model).run(prompt, [given, rival, Cell(own, None)]))
    for cell, company in zip((given, rival), together, strict=False):
        (alone,) = ok(Engine(model).run(prompt, [cell]))
        assert (alone.token_ids, alone.kept_slots) == (company.token_ids, company.kept_slots)
        assert alone.budget_tokens == company.budget_tokens


def test_a_prompt_that_is_kept_whole_leaves_nothing_to_compare(model: AttachedModel) -> None:
    own = Found(TOKENS)
    alone, rival = Engine(model).run(make_prompt(TOKENS), [Cell(own, None), pair(own)])
    assert ok([alone])[0].kv_bytes == alone.full_bytes
    assert (rival.status, rival.budget_tokens) == ("skipped", TOKENS)
    assert rival.error == f"found's budget {TOKENS} is not below the prompt's {TOKENS} tokens; nothing to compress"


def test_where_it_fails_the_pair_says_why_and_is_tried_again(model: AttachedModel) -> None:
    own = Found(fails=True)
    alone, rival, other = Engine(model).run(make_prompt(TOKENS), [Cell(own, None), pair(own), Cell(Found(), None)])
    assert (alone.status, rival.status, other.status) == ("failed", "failed", "ok")
    assert rival.error == "found found no budget for this prompt: ValueError: broken"


def test_gvote_runs_and_its_pairs_with_it_in_every_mode(model: AttachedModel) -> None:
    own = make_policy("gvote", {"p_nuc": 0.5})
    cells = [Cell(own, None), pair(own), pair(own, "adakv"), Cell(make_policy("quant", {"over": "gvote"}), None)]
    for first, query in (("compressed", "aware"), ("prefill", "aware"), ("compressed", "agnostic")):
        found = ok(Engine(model, first_token=first, query=query).run(make_prompt(TOKENS), cells))  # type: ignore[arg-type]
        assert found[0].stored_bytes < found[0].full_bytes and not any(o.over_budget for o in found)


def test_it_finds_its_budget_anew_after_each_turn_of_a_conversation(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (harness.engine.engine, harness.engine.turns):  # the queries that it keeps are no part of this
        monkeypatch.setattr(module, "beside", lambda noted: 0)
    own, limits = make_policy("gvote", {"p_nuc": 0.5}), Limits(6, frozenset())
    turns = tuple(NextTurn(tuple(range(20, 40)), limits) for _ in range(2))
    grows = replace(make_prompt(TOKENS, limits), turns=turns)
    cells = [Cell(own, None), pair(own)]
    again, rival = ok(Engine(model).run(replace(grows, again=True), cells))
    (once, _) = ok(Engine(model).run(grows, cells))
    assert again.kv_bytes_end < once.kv_bytes_end and again.kv_bytes == once.kv_bytes
    assert not again.notes and not any("asked" in note for note in rival.notes)
