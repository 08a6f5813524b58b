"""Turns: what a conversation says over a cache that grows, and what is kept of one that is compressed again."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import harness.engine.engine
import harness.engine.turns
from harness.engine.again import Noted, compress_again, note, pass_turn, why_not
from harness.engine.compress import Compressed, compress
from harness.engine.engine import Engine
from harness.engine.packed import storage_bytes, tensors_of
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Limits, NextTurn, Prompt
from harness.models.load import LoadedModel
from harness.records.record import OVER
from methods.base import KV, KVPolicy, LayerPolicy, LayerView, PromptView
from methods.quest import Quest
from methods.registry import make_policy
from methods.window import pooled
from tests.engine.llama_loops import DIM, GROUP, HEADS, LAYERS, Loops, Visible, grown, prefilled
from tests.engine.test_engine import CODED, LABELS, MODES, SLOT, STATIC, Ragged, cell, make_prompt, ok, same
from tests.engine.test_transformers_seam import pair
from tests.engine.test_transformers_seam import prompt as seam_prompt

TOKENS, BORDER, BUDGET = 60, 45, 16
ENDS = frozenset(range(0, 261, 9))  # a ninth of all tokens end an answer
LIMITS = Limits(6, ENDS)
TURN = torch.randint(5, 260, (14,), generator=torch.Generator().manual_seed(8)).tolist()
CANNOT = {"compilerkv@paper", "compilerkv@head_only", "compilerkv@gate_only", "compilerkv@independent"}
"""They read log-probabilities of the prompt."""
CANNOT |= {  # a second pass over the prompt; more than keys and values
    label
    for label, policy in zip(LABELS, map(make_policy, LABELS), strict=True)
    if policy.budgeted and (policy.needs.repeat or isinstance(policy, (*CODED, Quest)))
}
AGAIN = [
    label
    for label in LABELS
    if make_policy(label).budgeted and not make_policy(label).evicts_while_decoding and label not in CANNOT
]
every_mode = pytest.mark.parametrize(("first_token", "query"), MODES)


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model), tiny.wording)


def talk(*, again: bool = False, limits: Limits = LIMITS) -> Prompt:
    turns = [NextTurn(TURN[at : at + 4], limits) for at in (0, 4, 8)]
    return replace(make_prompt(TOKENS, limits), turns=turns, again=again)


@dataclass(frozen=True)
class Everything(LayerPolicy):
    """Keeps every slot, whatever the budget."""

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        return view.kv.take(torch.arange(view.tokens).expand(view.kv.positions.shape))


def plain(model: Any, prompt: Prompt) -> list[list[int]]:
    """Greedy answers of the model itself, which reads the whole transcript anew for each token."""
    ids, answers = list(prompt.ids), []
    for turn in (None, *prompt.turns):
        ids += turn.ids if turn else []
        said: list[int] = []
        while len(said) < prompt.limits.max_new_tokens:
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in prompt.limits.eos_ids:
                break
            said.append(token)
            ids.append(token)
        answers.append(said)
    return answers


@every_mode
def test_a_full_cache_says_what_the_model_says_of_the_whole_transcript(
    model: AttachedModel, tiny: LoadedModel, first_token: Any, query: Any
) -> None:
    engine, prompt = Engine(model, query=query, first_token=first_token), talk()
    full, kept = ok(engine.run(prompt, [cell("fullkv", 1), cell(Everything(), BUDGET)]))
    answers = plain(tiny.model, prompt)
    assert full.token_ids == tuple(token for answer in answers for token in answer)
    assert full.turn_tokens == tuple(map(len, answers)) and len(set(full.turn_tokens)) > 1
    full_again, kept_again = ok(engine.run(talk(again=True), [cell("fullkv", 1), cell(Everything(), BUDGET)]))
    for other in (kept, full_again, kept_again):
        assert (other.token_ids, other.turn_tokens) == (full.token_ids, full.turn_tokens)
    assert "asked" in kept_again.notes[0] and not full_again.notes  # what keeps everything is over its budget
    assert full.kv_bytes_end == full_again.kv_bytes_end > full.kv_bytes


@pytest.mark.parametrize("name", ["gemma3", "qwen2-late-windows"])
def test_layers_of_a_sliding_window_go_on_as_the_model_s(name: str) -> None:
    whole, attached = pair(name)
    limits = Limits(5, frozenset())
    asked = replace(seam_prompt(30), limits=limits, turns=[NextTurn([7, 40, 9], limits), NextTurn([50], limits)])
    gold = plain(whole, asked)
    for prompt in (asked, replace(asked, again=True)):
        found = ok(Engine(attached).run(prompt, [cell("fullkv", 1), cell(Everything(), 8)]))
        assert [outcome.token_ids for outcome in found] == [tuple(token for own in gold for token in own)] * 2
    small, large = (ok(Engine(attached).run(own, [cell("streamingllm", 8)]))[0] for own in (prompt, asked))
    assert small.kv_bytes == large.kv_bytes and small.kv_bytes_end < large.kv_bytes_end and not small.notes


@every_mode
def test_a_conversation_says_the_same_alone_and_its_first_turn_is_the_prompt_s(
    model: AttachedModel, first_token: Any, query: Any
) -> None:
    engine = Engine(model, query=query, first_token=first_token)
    cells = [cell(label, BUDGET) for label in (*STATIC, "quant@snapkv-int4", "h2o@paper", "compilerkv@streaming")]
    single = ok(engine.run(make_prompt(TOKENS, LIMITS), cells))
    for together, first, asked in zip(ok(engine.run(talk(), cells)), single, cells, strict=True):
        alone = ok(engine.run(talk(), [asked]))[0]
        same(alone, together)
        assert alone.turn_tokens == together.turn_tokens and len(alone.turn_tokens) == 4
        assert together.token_ids[: together.turn_tokens[0]] == first.token_ids
        assert (together.kv_bytes, together.stored_bytes) == (first.kv_bytes, first.stored_bytes)


@every_mode
def test_what_evicts_while_it_decodes_stays_at_its_budget_through_all_turns(
    model: AttachedModel, first_token: Any, query: Any
) -> None:
    engine = Engine(model, query=query, first_token=first_token)
    cells = [cell(label, BUDGET) for label in LABELS if make_policy(label).evicts_while_decoding]
    assert len(cells) == 6
    for one, other in zip(ok(engine.run(talk(), cells)), ok(engine.run(talk(again=True), cells)), strict=True):
        assert one.kv_bytes_end <= one.asked_bytes and one.token_ids == other.token_ids
        assert [*one.notes, "it evicts while it decodes: nothing is left to compress again"] == [*other.notes]


def test_every_method_is_compressed_again_or_says_why_not(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (harness.engine.engine, harness.engine.turns):  # what is observed is counted in the next test
        monkeypatch.setattr(module, "beside", lambda noted: 0)
    engine, skipped = Engine(model), set()
    found = engine.run(talk(again=True), [cell(label, BUDGET) for label in LABELS])
    for label, own in zip(LABELS, found, strict=True):
        if own.status == "skipped":
            skipped.add(label)
            assert "cannot compress again: " in str(own.error)
            continue
        ok([own])
        assert not any("asked" in said for said in own.notes), label
        if label in AGAIN:  # its last turn came on top of the budget
            assert own.kv_bytes_end <= own.asked_bytes + (4 + own.turn_tokens[-1]) * LAYERS * HEADS * SLOT, label
    assert skipped == CANNOT


def queries_kept(label: str) -> int:
    """Bytes of the queries that are kept for the next compression."""
    return min(make_policy(label).needs.window, TOKENS) * LAYERS * HEADS * GROUP * DIM * 4


@pytest.mark.parametrize(("label", "sums"), [("snapkv", 0), ("h2o", LAYERS * HEADS * GROUP * 4), ("streamingllm", 0)])
def test_what_is_kept_to_compress_again_is_counted_while_it_is_held(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch, label: str, sums: int
) -> None:
    """Queries of the window, and of h2o the sums of every slot that was left, for each token that is picked."""
    counted = ok(Engine(model).run(talk(again=True), [cell(label, BUDGET)]))[0]
    for module in (harness.engine.engine, harness.engine.turns):
        monkeypatch.setattr(module, "beside", lambda noted: 0)
    apart = ok(Engine(model).run(talk(again=True), [cell(label, BUDGET)]))[0]
    beside = queries_kept(label) + sums * BUDGET
    assert counted.kv_bytes_end - apart.kv_bytes_end == counted.stored_bytes_end - apart.stored_bytes_end == beside
    steps = len(counted.token_ids)
    assert counted.byte_steps - apart.byte_steps in [beside * own for own in range(steps, steps + 5)]  # four may end
    assert counted.kv_bytes == apart.kv_bytes


def compressed(model: AttachedModel, policy: KVPolicy, budget: int = BUDGET) -> tuple[Compressed, list[Noted]]:
    ids = make_prompt(TOKENS).ids[:BORDER]
    seen = Engine(model).prefill(ids, policy.needs)
    left = compress(seen, policy, budget)
    assert why_not(seen, left) is None
    assert "marked to be kept" in str(why_not(replace(seen, protected=(3,)), left))
    return left, note(seen, left)


@pytest.mark.parametrize("budget", [6, BUDGET])
@pytest.mark.parametrize("label", AGAIN)
def test_compressing_again_keeps_as_many_slots_in_as_many_bytes(model: AttachedModel, label: str, budget: int) -> None:
    first, noted = compressed(model, make_policy(label), budget)
    left, start = first, BORDER
    for ids in (TURN, TURN[:3], TURN[3:12]):
        left, noted = compress_again(model, left, noted, ids, start)
        start += len(ids)
        assert left.stored_bytes <= OVER * first.asked_bytes
        assert sum(left.kept_slots) == sum(first.kept_slots)
        assert max(int(kv.positions.max()) for kv in left.kvs) < start == left.tokens


NONE_DEAD = ("random", "keydiff", "lagkv", "cur", "compactor")


@pytest.mark.parametrize("label", [label for label in AGAIN if not any(own in label for own in NONE_DEAD)])
def test_dead_slots_change_nothing(model: AttachedModel, label: str) -> None:
    """However many there are, a policy keeps the same tokens, none of them dead.

    `NONE_DEAD` never see one, as their layers and heads are all alike: the first draws for each slot, the second takes
    the mean of all, the others cut the slots into stretches.
    """
    policy = make_policy(label)
    left, noted = compressed(model, policy)
    left, noted = compress_again(model, left, noted, TURN, BORDER)
    layers, _ = pass_turn(model, left, noted, TURN[:10], left.tokens)
    most = max(int(layer.most) for layer in layers)
    sinks = getattr(getattr(policy, "inner", policy), "sinks", 0)

    def kept(slots: int) -> list[list[list[int]]]:
        views = [layer.view(at, slots=slots, sinks=sinks, rotate=model.rotate) for at, layer in enumerate(layers)]
        view = PromptView([*views], seen=left.tokens + 10)
        return [
            [sorted(at for at in head if at >= 0) for head in kv.positions[0].tolist()]
            for kv in policy.compress(view, BUDGET)
        ]

    assert kept(most) == kept(most + 5)


def test_a_dead_slot_is_attended_by_nobody_and_never_revived(model: AttachedModel) -> None:
    left, noted = compressed(model, Ragged(), 5)
    layers, _ = pass_turn(model, left, noted, TURN, BORDER)
    dead = 0
    for index, layer in enumerate(layers):
        layer.noted = Noted(torch.randn(1, HEADS * GROUP, 20, 16, generator=torch.Generator().manual_seed(index)), None)
        view = layer.view(index, slots=max(int(own.most) for own in layers) + 2, sinks=2, rotate=model.rotate)
        found = view.attention(20)
        for head, positions in enumerate(view.kv.positions[0].tolist()):
            live = [slot for slot, at in enumerate(positions) if at >= 0]
            gone = [slot for slot, at in enumerate(positions) if at < 0]
            assert gone[0] == min(2, len(live)) and gone == [*range(gone[0], gone[0] + len(gone))]
            assert [positions[slot] for slot in live] == sorted(positions[slot] for slot in live)
            assert not found[0, head][..., gone].any()
            keys = view.kv.keys[0, head, live]
            for member in range(GROUP):
                for back in range(20):
                    query = view.queries[0, head * GROUP + member, back]
                    asked = left.tokens + len(TURN) - 20 + back
                    logits = torch.tensor([float(query @ key) * view.scaling for key in keys]).masked_fill(
                        torch.tensor([positions[slot] > asked for slot in live]), -torch.inf
                    )
                    own = logits.softmax(0).nan_to_num(0.0)
                    torch.testing.assert_close(found[0, head, member, back, live], own, atol=1e-5, rtol=1e-4)
            dead += len(gone)
        everything = view.kv.take(torch.arange(view.tokens).expand(view.kv.positions.shape))
        assert torch.equal(everything.positions, view.kv.positions)
        assert (
            torch.isneginf(view.only_live(torch.ones(view.kv.positions.shape))).sum() == (view.kv.positions < 0).sum()
        )
    assert dead > 3 * LAYERS


def heaviest(sums: dict[int, float], budget: int) -> set[int]:
    """H2O: half the slots to the newest tokens, half to those that collected most."""
    order = sorted(sums)
    recent = order[len(order) - (budget - budget // 2) :]
    return {*recent, *sorted(set(order) - {*recent}, key=lambda at: (-sums[at], at))[: budget // 2]}


def most_voted(sums: dict[int, float], budget: int, *, recent: int, kernel: int) -> set[int]:
    """SnapKV: the newest tokens, and of the others the best by what these paid, pooled over neighbours still there."""
    order = sorted(sums)
    before = order[: len(order) - recent]
    votes = pooled(torch.tensor([[[sums[at] for at in before]]]), kernel, "max")[0, 0].tolist()
    best = sorted(range(len(before)), key=lambda i: (-votes[i], i))[: budget - recent]
    return {*order[len(before) :], *(before[i] for i in best)}


def naive(model: AttachedModel, label: str, turns: list[list[int]]) -> list[Visible]:
    """What is kept after the prompt and after each turn, by loops over tokens and heads, nothing of the engine's."""
    recent = 5
    with torch.no_grad():
        loops, _ = prefilled(model.model, tuple(make_prompt(TOKENS).ids[:BORDER]))
        held = (loops.copy(), [[set(range(BORDER)) for _ in range(HEADS)] for _ in range(LAYERS)])
        before = _sums_before_last(model, recent)
        kept = [_chosen(held, label, before, recent)]
        position = BORDER
        for ids in turns:
            held = (held[0], kept[-1])
            for i, token in enumerate(ids):
                if i == len(ids) - recent:
                    before = dict(held[0].sums)
                _, held = grown(held, token, position, None)
                position += 1
            kept.append(_chosen(held, label, before, recent))
    return kept


def _sums_before_last(model: AttachedModel, recent: int) -> dict[tuple[int, int, int], float]:
    loops, _ = prefilled(model.model, tuple(make_prompt(TOKENS).ids[: BORDER - recent]))
    return dict(loops.sums)


def _chosen(held: tuple[Loops, Visible], label: str, before: dict[Any, float], recent: int) -> Visible:
    loops, visible = held
    kept: Visible = []
    for layer, heads in enumerate(visible):
        kept.append([])
        for head, seen in enumerate(heads):
            all_of = {at: loops.sums[layer, head, at] for at in seen}
            if label == "h2o":
                kept[-1].append(heaviest(all_of, BUDGET))
            else:
                lately = {at: total - before.get((layer, head, at), 0.0) for at, total in all_of.items()}
                kept[-1].append(most_voted(lately, BUDGET, recent=recent, kernel=3))
    return kept


@pytest.mark.parametrize("label", ["h2o", "snapkv"])
def test_what_is_kept_again_is_what_loops_over_the_transcript_keep(model: AttachedModel, label: str) -> None:
    policy = make_policy(label, {} if label == "h2o" else {"recent": 5, "kernel": 3})
    left, noted = compressed(model, policy)
    turns = [TURN[:6], TURN[6:], TURN[2:11]]
    wanted, start = naive(model, label, turns), BORDER
    for ids, gold in zip([[], *turns], wanted, strict=True):
        if ids:
            left, noted = compress_again(model, left, noted, ids, start)
            start += len(ids)
        assert [[{*head} for head in kv.positions[0].tolist()] for kv in left.kvs] == gold


def test_a_prompt_s_last_token_that_is_fed_again_is_there_once(model: AttachedModel) -> None:
    policy = make_policy("snapkv", {"recent": 8})
    left, noted = compressed(model, policy)
    last = make_prompt(TOKENS).ids[BORDER - 1]
    again, _ = compress_again(model, left, noted, [last, *TURN[:3]], BORDER - 1)
    assert again.tokens == BORDER + 3
    for kv in again.kvs:
        for head in kv.positions[0].tolist():
            assert len(set(head)) == len(head) == BUDGET and {*range(BORDER + 3 - 8, BORDER + 3)} <= {*head}
    layers, _ = pass_turn(model, left, noted, [last, *TURN[:3]], BORDER - 1)
    seen = layers[0].noted
    assert seen is not None and seen.queries.shape[2] == 8
    torch.testing.assert_close(seen.queries[:, :, :4], noted[0].queries[:, :, 3:7])


def test_stored_bytes_of_a_row_are_those_of_its_layers(model: AttachedModel) -> None:
    left, noted = compressed(model, make_policy("compilerkv"))
    now, _ = compress_again(model, left, noted, TURN, BORDER)
    assert now.stored_bytes == storage_bytes(x for layer in now.layers for x in tensors_of(layer)) == now.kv_bytes
