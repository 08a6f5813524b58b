"""CompilerKV while decoding: every head stays at its own number of slots, and gives up what a plain loop gives up."""

import copy
from pathlib import Path

import pytest
import torch

from harness.contract import GROUP, HEADS, LAYERS
from harness.engine.engine import Engine
from harness.engine.evicting_cache import with_room
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from methods.base import Budget, PolicyError, StepView
from methods.compilerkv.form import Form
from methods.compilerkv.policy import CompilerKV
from methods.compilerkv.streaming import affordable
from methods.registry import make_policy
from tests.methods.compiled import prompt, saved

TOKENS, BUDGET, EVERY = 60, 24, 5


def loop(
    worth: dict[int, float], seen: dict[int, float], *, form: Form, position: int, recent: int
) -> tuple[int, dict[int, float], dict[int, float]]:
    """The token that one head gives up, after worth was brought up to date."""
    if position % EVERY == 0:
        order = sorted(worth)
        around = {t: order[max(0, i - form.kernel + 1) : i + 1] for i, t in enumerate(order)}
        spread = {t: sum(seen[n] for n in around[t]) / form.kernel / EVERY for t in order}
        worth = {t: form.whole * worth[t] + (1 - form.whole) * spread[t] for t in order}
        seen = dict.fromkeys(order, 0.0)
    old = [t for t in worth if t <= position - recent]
    return min(old, key=lambda t: worth[t]), worth, seen


def test_each_step_frees_what_a_loop_frees(tmp_path: Path) -> None:
    saved(tmp_path)
    policy = make_policy("compilerkv@streaming", {"tables": str(tmp_path), "every": EVERY})
    form = Form(window=4, kernel=5, whole=0.3)
    view = prompt(TOKENS)
    scores = form.scores(view)
    draw = torch.Generator().manual_seed(5)
    for layer, kv in enumerate(policy.compress(view, BUDGET)):
        held, slots = with_room(kv, 1), kv.live[0].tolist()
        kept = [[token for token in row if token >= 0] for row in kv.positions[0].tolist()]
        own = [{t: scores[layer][0, head, t].item() for t in row} for head, row in enumerate(kept)]
        seen = [dict.fromkeys(worth, 0.0) for worth in own]
        for position in range(TOKENS, TOKENS + 17):
            free = held.positions.argmin(dim=-1, keepdim=True)
            held.positions.scatter_(2, free, position)
            attention = torch.rand(1, HEADS, GROUP, held.positions.shape[2], generator=draw)
            freed = policy.after_step(StepView(held, attention, position, BUDGET))
            for head in range(HEADS):
                own[head][position] = seen[head][position] = 0.0
                for slot, token in enumerate(held.positions[0, head].tolist()):
                    if token >= 0:
                        seen[head][token] += attention[0, head, :, slot].mean().item()
                recent = min(form.window, slots[head] - 1)
                gone, own[head], seen[head] = loop(own[head], seen[head], form=form, position=position, recent=recent)
                assert held.positions[0, head, freed[0, head]].item() == gone
                del own[head][gone], seen[head][gone]
            held.positions.scatter_(2, freed.unsqueeze(-1), -1)
            assert held.live[0].tolist() == slots


def test_side_data_is_paid_out_of_the_budget(tmp_path: Path) -> None:
    saved(tmp_path)
    view = prompt(TOKENS)
    policy = make_policy("compilerkv@streaming", {"tables": str(tmp_path)})
    kept, full = policy.compress(view, BUDGET), view.layers[0].kv
    held, slot = sum(int(kv.live.sum()) for kv in kept), full.slot_bytes
    assert held == affordable(full, BUDGET) * LAYERS * HEADS
    assert sum(kv.nbytes for kv in kept) == held * (slot + 8) + 4 * LAYERS * HEADS <= BUDGET * LAYERS * HEADS * slot


def test_a_long_output_stays_within_its_budget(tiny: LoadedModel) -> None:
    engine = Engine(AttachedModel(copy.deepcopy(tiny.model)))
    ids: list[int] = torch.randint(5, 260, (80,), generator=torch.Generator().manual_seed(3)).tolist()
    cells = [Cell(make_policy(name), Budget(tokens=40)) for name in ("compilerkv", "compilerkv@streaming")]
    grown, streamed = engine.run(Prompt(ids, 60, [70, 80, 90], Limits(50, frozenset(), 50)), cells)
    assert (grown.status, streamed.status) == ("ok", "ok")
    assert len(streamed.token_ids) == 50 and len(streamed.nll_per_token) == 3
    slot = grown.kv_bytes // sum(grown.kept_slots) - 4  # tokens that come need no position
    heads = len(grown.kept_slots) * tiny.model.config.num_key_value_heads
    assert grown.kv_bytes_end == grown.kv_bytes + (49 * slot - 4) * heads  # nor does the last one, fed again
    assert streamed.kv_bytes_end <= streamed.kv_bytes <= 1.01 * streamed.asked_bytes


def test_any_period_evicts_while_decoding_and_the_published_form_acts_once() -> None:
    assert [CompilerKV(tables="neutral", every=every).evicts_while_decoding for every in (0, 1)] == [False, True]
    with pytest.raises(PolicyError, match="every=4: the published form acts once"):
        CompilerKV(form="published", every=4)
