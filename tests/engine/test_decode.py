"""When a generation ends, and what happens to the other cells when one fails or memory runs out."""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from methods.base import KV, Budget, LayerPolicy, LayerView, PolicyError, StepView
from methods.fullkv import FullKV
from methods.random import RandomEviction
from methods.snapkv import SnapKV
from methods.streamingllm import StreamingLLM

NEW = 9
IDS = torch.randint(5, 260, (36,), generator=torch.Generator().manual_seed(5)).tolist()
FULL = Cell(FullKV(), None)
OTHERS = [Cell(SnapKV(recent=4), Budget(tokens=n)) for n in (6, 12)] + [
    Cell(StreamingLLM(evict=True), Budget(tokens=9))
]


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model))


def words(tokens: Sequence[int]) -> str:
    return "".join(f"{token} " for token in tokens)


def prompt(eos: Sequence[int] = (), **limits: Any) -> Prompt:
    return Prompt(IDS, 24, (70, 80, 90), Limits(limits.pop("new", NEW), frozenset(eos), text=words, **limits))


def generate(model: AttachedModel, **limits: Any) -> list[int]:
    outcome = Engine(model).run(prompt(**limits), [FULL])[0]
    assert outcome.status == "ok"
    return list(outcome.token_ids)


def plain(tiny: LoadedModel, count: int, barred: Sequence[int] = (), until: int = 0) -> list[int]:
    """Greedy generation that feeds everything anew at each step; `barred` may not be chosen before step `until`."""
    tokens: list[int] = []
    for step in range(count):
        logits = tiny.model(torch.tensor([IDS + tokens])).logits[0, -1]
        if step < until:
            logits[list(barred)] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


def test_generation_is_greedy_up_to_its_limit_or_the_end_of_text(model: AttachedModel, tiny: LoadedModel) -> None:
    gold = plain(tiny, NEW)
    for new in (1, 2, NEW):
        assert generate(model, new=new) == gold[:new]
    never = min(set(range(260)) - set(gold))
    for end in set(gold):
        assert generate(model, eos=[end, never]) == gold[: gold.index(end)]


@pytest.mark.parametrize("until", [1, 3, NEW])
def test_end_of_text_is_barred_before_the_minimum(model: AttachedModel, tiny: LoadedModel, until: int) -> None:
    eos = [plain(tiny, 1)[0], *range(0, 260, 2)]
    gold = plain(tiny, NEW, barred=eos, until=until)
    end = next((i for i, token in enumerate(gold) if token in eos), NEW)
    assert end >= until
    assert generate(model, eos=eos, min_new_tokens=until) == gold[:end]


def test_a_stop_string_ends_a_generation_however_it_is_spread(model: AttachedModel, tiny: LoadedModel) -> None:
    gold = plain(tiny, NEW)
    for first, last in ((0, 0), (3, 4), (1, 5), (0, NEW - 2)):
        stop = words(gold[first : last + 1])
        ends = next(n for n in range(1, NEW + 1) if stop in words(gold[:n]))
        assert generate(model, stop=("never", stop)) == gold[:ends]
        assert len(generate(model, stop=(stop,), min_new_tokens=NEW - 1)) == NEW


@pytest.mark.parametrize("length", [1, 12, 40])
def test_stop_strings_are_found_in_texts_of_one_byte_a_token(length: int) -> None:
    text, stop = "x" * 50, "y" * length
    limits = Limits(10_000, frozenset(), stop=(stop,), text=lambda ids: bytes(ids).decode())
    tokens = list((text + stop).encode())
    assert limits.ends(tokens)
    assert not limits.ends(tokens[:-1])
    assert not limits.ends(list(text.encode()))


ERRORS: list[tuple[type[BaseException], str, str]] = [
    (PolicyError, "cannot do this", "failed"),
    (HarnessError, "not on this model", "failed"),
    (RuntimeError, "shapes differ", "failed"),
    (IndexError, "out of range", "failed"),
    (KeyError, "sums", "failed"),
    (TypeError, "no number", "failed"),
    (torch.OutOfMemoryError, "CUDA out of memory", "oom"),
    (MemoryError, "", "oom"),
    (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried", "oom"),
]


@dataclass(frozen=True)
class Raising(LayerPolicy):
    """Raises while it compresses, or, when it evicts, after the token at `at` attended."""

    error: type[BaseException]
    text: str
    at: int | None = None

    @property
    def evicts_while_decoding(self) -> bool:
        return self.at is not None

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        if self.at is None:
            raise self.error(self.text)
        return view.kv.take(view.kv.positions[..., -budget:])

    def after_step(self, step: StepView) -> Tensor:
        if step.position == self.at:
            raise self.error(self.text)
        return step.kv.positions.masked_fill(step.kv.positions < 0, 10**9).argmin(dim=-1)


@pytest.mark.parametrize(("error", "text", "status"), ERRORS)
@pytest.mark.parametrize("at", [None, len(IDS) + 1])
def test_a_cell_that_raises_is_marked_and_the_others_go_on(
    model: AttachedModel, error: type[BaseException], text: str, status: str, at: int | None
) -> None:
    engine = Engine(model, first_token="prefill")
    alone = engine.run(prompt(), [FULL, *OTHERS])
    bad, *others = engine.run(prompt(), [Cell(Raising(error, text, at), Budget(tokens=8)), FULL, *OTHERS])
    assert bad.status == status
    assert bad.error and text in bad.error
    assert bad.token_ids == bad.nll_per_token == ()
    assert [(o.status, o.token_ids) for o in others] == [("ok", o.token_ids) for o in alone]


def test_an_interrupt_is_no_failure_of_a_cell(model: AttachedModel) -> None:
    for at in (None, len(IDS) + 1):
        cell = Cell(Raising(KeyboardInterrupt, "", at), Budget(tokens=8))
        with pytest.raises(KeyboardInterrupt):
            Engine(model).run(prompt(), [cell, FULL])


@dataclass(frozen=True)
class Short(FullKV):
    """Forgets a layer."""

    def compress(self, view: Any, budget: int) -> list[KV]:
        return super().compress(view, budget)[:-1]


def test_a_policy_that_forgets_a_layer_is_told_so(model: AttachedModel) -> None:
    outcomes = Engine(model).run(prompt(), [Cell(Short(), None), FULL])
    assert [outcome.status for outcome in outcomes] == ["failed", "ok"]
    assert "left 3 layers of 4" in (outcomes[0].error or "")


@pytest.mark.parametrize(("fits", "statuses"), [(3, {"ok"}), (1, {"ok"}), (0, {"oom"})])
def test_a_decode_batch_that_does_not_fit_is_halved_with_its_memory_freed(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch, fits: int, statuses: set[str]
) -> None:
    cells = [Cell(RandomEviction(seed=seed), Budget(tokens=10)) for seed in range(7)]
    gold = Engine(model).run(prompt(), cells)
    batches: list[weakref.ref[Tensor]] = []
    real = Decoding.step

    def step(self: Decoding, tokens: Sequence[int]) -> Tensor:
        assert all(ref() is None for ref in batches), "the batch that did not fit is still in memory"
        if self.rows > fits:
            held = torch.empty(0)  # stands for the tensors of the batch
            batches.append(weakref.ref(held))
            raise torch.OutOfMemoryError(f"no room for {self.rows} rows beside {held}")
        return real(self, tokens)

    monkeypatch.setattr(Decoding, "step", step)
    outcomes = Engine(model).run(prompt(), cells)
    assert {outcome.status for outcome in outcomes} == statuses
    if fits:
        assert [o.token_ids for o in outcomes] == [o.token_ids for o in gold]
        assert max(outcome.decode_rows for outcome in outcomes) <= fits
        assert [o.nll_per_token for o in outcomes] == [pytest.approx(o.nll_per_token, abs=1e-4) for o in gold]
    else:
        assert all(outcome.error and not outcome.token_ids for outcome in outcomes)


def test_a_prefill_that_does_not_fit_marks_every_cell(model: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(AttachedModel, "forward", full)
    assert {o.status for o in Engine(model).run(prompt(), [FULL, *OTHERS])} == {"oom"}


def test_a_budget_of_the_whole_prompt_is_skipped(model: AttachedModel) -> None:
    budgets = [Budget(tokens=len(IDS) - 1), Budget(tokens=len(IDS)), Budget(tokens=999), Budget(fraction=0.5)]
    outcomes = Engine(model).run(prompt(), [Cell(RandomEviction(), budget) for budget in budgets])
    assert [outcome.status for outcome in outcomes] == ["ok", "skipped", "skipped", "ok"]
    assert "budget 999 is not below the prompt's 36 tokens" in (outcomes[2].error or "")
    assert outcomes[3].budget_tokens == 18
    assert outcomes[3].kept_slots == (36,) * 4
    whole = Engine(model, query="agnostic").run(prompt(), [Cell(RandomEviction(), Budget(tokens=24))])[0]
    assert (whole.status, whole.compressed_tokens) == ("skipped", 24)


@pytest.mark.parametrize("context", [0, len(IDS)])
def test_a_prompt_without_context_or_question_is_skipped_when_the_question_is_hidden(
    model: AttachedModel, context: int
) -> None:
    asked = Prompt(IDS, context, (), Limits(2, frozenset()))
    outcomes = Engine(model, query="agnostic").run(asked, [FULL, *OTHERS])
    assert {(outcome.status, "context" in (outcome.error or "")) for outcome in outcomes} == {("skipped", True)}
    assert Engine(model).run(asked, [FULL])[0].status == "ok"
