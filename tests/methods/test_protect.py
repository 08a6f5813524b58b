"""`protect` around every method: what is marked is kept, the budget is the same, the rest is the method's choice."""

import pytest
import torch

from harness.contract import HEADS, LAYERS, PLAIN, make_view
from methods.base import KV, EvictionPolicy, Needs, PolicyError, PromptView
from methods.budget import BudgetTooSmall
from methods.coded import CodedPolicy
from methods.protect import PRESETS
from methods.random import RandomEviction
from methods.registry import load_methods, make_policy
from methods.tuned.artefact import load_tuning, packaged

TOKENS, MARKED = 90, (0, 1, 30, 31, 32, 33, 34, 60)
BUDGETS = (9, 12, 24, 40)
CODED = sorted(name for name, entry in load_methods().items() if issubclass(entry.policy, CodedPolicy))
REFUSED = {
    **dict.fromkeys(["fullkv", *CODED], "evicts nothing"),
    **{
        "protect": "protects already",
        "rkv": "evicts while decoding",
        "finch": "moves the keys",
        "gvote": "has no budget",
    },
}
STORED = ("matryoshkakv", "quest", "recalkv")  # with a budget, but as something else than slots
AROUND = sorted({*load_methods()} - {*REFUSED, *STORED})


class Reader(RandomEviction):
    """A method that reads hidden states, as a press does."""

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=True)


def view_of(needs: Needs, protected: tuple[int, ...] = MARKED) -> PromptView:
    view = make_view(TOKENS, needs)
    view.protected = protected
    return view


def positions(kvs: list[KV]) -> list[list[set[int]]]:
    return [[{at for at in head if at >= 0} for head in kv.positions[0].tolist()] for kv in kvs]


@pytest.mark.parametrize("over", AROUND)
def test_marked_tokens_are_kept_within_the_budget_and_the_rest_is_the_methods(over: str) -> None:
    policy, inner = make_policy("protect", {"over": over}), make_policy(over)
    view = view_of(policy.needs)
    for budget in BUDGETS:
        kept = policy.compress(view, budget)
        own = positions(inner.compress(view.others, budget - len(MARKED)))
        assert positions(kept) == [[head | set(MARKED) for head in layer] for layer in own]
        assert not any(head & set(MARKED) for layer in own for head in layer)
        plain = sum(kv.nbytes for kv in inner.compress(view, budget))
        assert sum(kv.nbytes for kv in kept) == plain == budget * LAYERS * HEADS * PLAIN
        for layer, kv in zip(view.layers, kept, strict=True):
            live = kv.positions >= 0
            assert torch.equal(kv.keys[live], layer.kv.take(kv.positions).keys[live])
            assert torch.equal(kv.values[live], layer.kv.take(kv.positions).values[live])
            assert all(at == sorted(at) for at in [row[row >= 0].tolist() for row in kv.positions[0]])


@pytest.mark.parametrize("over", ["snapkv", "tova", "h2o", "adakv"])
def test_the_rest_are_the_best_of_the_others_by_the_scores_of_the_whole_prompt(over: str) -> None:
    """Without pooling and a window of its own the choice is a sort of the whole prompt's scores."""
    changed = {"h2o": {"recent_share": 0.0}, "tova": {}, "snapkv": {"kernel": 1, "recent": 1}}.get(over, {"kernel": 1})
    inner = make_policy(over, {**changed, **({"recent": 1} if over == "adakv" else {})})
    assert isinstance(inner, EvictionPolicy)
    policy = make_policy("protect", {"over": over})
    object.__setattr__(policy, "inner", inner)
    view = view_of(inner.needs)
    for layer, kv in zip(view.layers, policy.compress(view, 20), strict=True):
        scores = inner.score(layer)[0]
        fixed = {TOKENS - 1} if getattr(inner, "recent", 0) else set()
        for head, row in enumerate(kv.positions[0].tolist()):
            rest = {at for at in row if at >= 0} - set(MARKED) - fixed
            ranked = sorted(set(range(TOKENS)) - set(MARKED) - fixed, key=lambda at: -scores[head, at].item())
            assert rest == set(ranked[: len(rest)]) and len(rest) > 0


def test_presets_go_around_every_method_that_can_be() -> None:
    assert {preset["over"] for preset in PRESETS.values()} <= set(AROUND)
    assert all(name == preset["over"] for name, preset in PRESETS.items())


@pytest.mark.parametrize(
    ("over", "why"), [*REFUSED.items(), ("h2o@paper", "evicts while decoding"), ("streamingllm@reassign", "moves")]
)
def test_what_cannot_be_protected_is_refused(over: str, why: str) -> None:
    with pytest.raises(PolicyError, match=rf"protect.over='{over}' .*{why}"):
        make_policy("protect", {"over": over})


@pytest.mark.parametrize("over", STORED)
def test_what_is_no_slots_is_refused_once_it_is_there(over: str) -> None:
    policy = make_policy("protect", {"over": over})
    with pytest.raises(PolicyError, match=f"protect.over='{over}' leaves more than keys and values"):
        policy.compress(view_of(policy.needs), 40)


def test_a_method_that_reads_hidden_states_is_refused_once_the_model_is_known() -> None:
    policy = make_policy("protect@random")
    policy.check(view_of(Needs()))
    object.__setattr__(policy, "inner", Reader())
    with pytest.raises(PolicyError, match="protect.over='random' reads hidden states"):
        policy.check(view_of(Needs()))


def test_tuned_parameters_are_those_of_the_model() -> None:
    (path, *_) = packaged("snapkv")
    tuning, _ = load_tuning(path)
    policy = make_policy("protect", {"over": "snapkv@tuned"}).for_model(tuning.model_revision)
    view = view_of(policy.needs)
    own = make_policy("snapkv", tuning.chosen).compress(view.others, 40 - len(MARKED))
    assert positions(policy.compress(view, 40)) == [[head | set(MARKED) for head in layer] for layer in positions(own)]
    assert "artefact_sha256" in policy.provenance() and policy.fitted_on() >= set(tuning.prompts)


def test_a_span_as_large_as_the_budget_is_one_clear_line() -> None:
    policy = make_policy("protect@snapkv")
    view = view_of(policy.needs)
    with pytest.raises(
        BudgetTooSmall, match="budget 8 leaves no slot beside the 8 protected tokens; ask for 9 or more"
    ):
        policy.compress(view, 8)
    with pytest.raises(BudgetTooSmall):
        policy.notes(8, view.sizes)


def test_without_a_mark_it_is_the_method_alone_and_says_so() -> None:
    policy, inner = make_policy("protect@knorm"), make_policy("knorm")
    view = view_of(policy.needs, ())
    assert positions(policy.compress(view, 20)) == positions(inner.compress(view, 20))
    assert policy.per_layer(20, view.sizes) is not None and policy.per_layer(20, view_of(Needs()).sizes) is None
    assert policy.notes(20, view.sizes) == ("this prompt marks nothing to protect: knorm alone",)
    assert policy.notes(20, view_of(Needs()).sizes) == ()


def test_codes_go_around_it() -> None:
    policy = make_policy("quant@int4", {"over": "protect@snapkv"})
    for kv in policy.compress(view_of(policy.needs), 50):
        assert all(set(MARKED) <= set(head) for head in kv.positions[0].tolist())
