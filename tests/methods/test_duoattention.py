"""DuoAttention: which heads are whole, and what the others hold, by a loop; without tables all of them stream."""

from pathlib import Path

import pytest

from harness.contract import GROUP, HEADS, LAYERS
from methods.base import PolicyError, Sizes
from methods.duoattention import DuoAttention
from methods.registry import make_policy
from tests.methods.compiled import kept, prompt, saved

SIZES = Sizes(90, LAYERS, HEADS * GROUP, HEADS)


def naive(importance: list[float], tokens: int, budget: int, sinks: int, recent: int, share: float) -> list[list[int]]:
    """Positions of each head [L * H]: whole ones while the slots last, then one with what is left, then streams."""
    stream = min(sinks + recent, max(1, int(share * budget)))
    sinks, left = min(sinks, int(stream * sinks / (sinks + recent))), budget * len(importance)
    found: list[list[int]] = [[]] * len(importance)
    order = sorted(range(len(importance)), key=lambda head: (-importance[head], head))
    for done, head in enumerate(order):
        own = min(tokens, left - stream * (len(order) - done - 1))
        left -= own
        found[head] = [t for t in range(tokens) if own == tokens or t < sinks or t >= tokens - (own - sinks)]
    return found


@pytest.mark.parametrize(("sinks", "recent", "share"), [(2, 6, 0.5), (0, 5, 0.5), (64, 256, 0.5), (64, 256, 0.25)])
@pytest.mark.parametrize("budget", [1, 3, 9, 20, 45, 60, 89])
def test_the_most_important_heads_are_whole_and_the_others_stream(
    tmp_path: Path, budget: int, sinks: int, recent: int, share: float
) -> None:
    importance = saved(tmp_path, prompts=("a" * 64,)).importance.flatten().tolist()
    policy = DuoAttention(sinks=sinks, recent=recent, share=share, tables=str(tmp_path))
    found = [[t for t in head if t >= 0] for layer in kept(policy, prompt(90), budget) for head in layer]
    assert found == naive(importance, 90, budget, sinks, recent, share)
    assert sum(map(len, found)) == budget * LAYERS * HEADS
    whole = [head for head, own in enumerate(found) if len(own) == 90]
    assert policy.notes(budget, SIZES) == (f"{len(whole)} of {LAYERS * HEADS} heads are whole",)
    assert (len(whole) > 0) == (budget >= 20) and all(found[head] == list(range(90)) for head in whole)
    assert policy.fitted_on() == {"a" * 64} and policy.provenance().keys() == {"tables_sha256"}
    with pytest.raises(PolicyError, match="tables .* are of some"):
        policy.for_model("r2")


def test_without_tables_every_head_streams_and_it_says_so() -> None:
    policy = make_policy("duoattention").for_model("unknown")
    assert kept(policy, prompt(90), 20) == [[[*range(4), *range(74, 90)]] * HEADS] * LAYERS
    assert policy.notes(20, SIZES) == ("no tables for this model: every head streams",)
