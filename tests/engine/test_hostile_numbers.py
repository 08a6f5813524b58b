"""NaN and infinite numbers: in weights, logits, scores and sums. The cell that meets them fails by name, no other."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.kernels import causal_attention, column_sums, slot_weights
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from methods.base import Budget, EvictionPolicy, LayerView, StepView
from methods.registry import make_policy
from methods.snapkv import SnapKV
from methods.views import Form
from tests.hostile import tried

pytestmark = pytest.mark.hostile

FULL, OTHER = Cell(make_policy("fullkv"), None), Cell(SnapKV(recent=4), Budget(tokens=9))
IDS = torch.randint(5, 260, (24,), generator=torch.Generator().manual_seed(5)).tolist()
NUMBERS = (math.nan, math.inf, -math.inf)


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model))


def run(
    model: AttachedModel, cells: Sequence[Cell], answer: Sequence[int] = (7, 8), ids: Sequence[int] = IDS
) -> list[Outcome]:
    return Engine(model).run(Prompt(ids, 12, answer, Limits(5, frozenset())), cells)


def refused(kind: str, outcome: Outcome, what: str) -> None:
    """A failed cell that says so in one line and has nothing that a record cannot hold."""
    assert outcome.status == "failed" and what in str(outcome.error), outcome
    assert all(math.isfinite(x) for x in outcome.nll_per_token)
    assert outcome.stored()["nll"] is None
    tried(kind, lambda: _raised(HarnessError(str(outcome.error))))


@pytest.fixture(params=["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def broken(model: AttachedModel, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A weight of the model, which is as before afterwards."""
    weight = model.model.get_parameter(request.param)
    before = weight.detach().clone()
    yield weight
    with torch.no_grad():
        weight.copy_(before)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("answer", [(), (7, 8)], ids=["no-reference", "reference"])
def test_a_model_of_such_weights_fails_every_cell(
    model: AttachedModel, broken: Any, number: float, answer: tuple[int, ...]
) -> None:
    with torch.no_grad():
        broken[1:] = number
    Engine(model).check([FULL.policy], IDS)  # a run begins: its cells say it
    for outcome in run(model, [FULL, OTHER], answer):
        refused("logits of the prompt", outcome, "after the prompt's 24 tokens are NaN or infinite")


@pytest.mark.parametrize("number", NUMBERS[:2])
def test_a_token_of_such_an_embedding_fails_its_prompt_alone(model: AttachedModel, number: float) -> None:
    table: Any = model.model.get_parameter("model.embed_tokens.weight")
    gold = run(model, [FULL])[0].token_ids
    try:
        with torch.no_grad():
            before = table[4].clone()
            table[4] = number
        refused("embedding of a token", run(model, [FULL], ids=[*IDS[:-1], 4])[0], "logits after the prompt")
        refused("embedding of a token", run(model, [FULL], answer=(4, 4))[0], "logits of the reference answer")
        assert run(model, [FULL])[0].token_ids == gold
    finally:
        with torch.no_grad():
            table[4] = before


@given(step=st.integers(0, 4), number=st.sampled_from(NUMBERS[:2]), row=st.integers(0, 2), token=st.integers(0, 9))
def test_a_row_whose_logits_break_while_decoding_ends_there(step: int, number: float, row: int, token: int) -> None:
    class Scripted(Decoding):
        at = 0

        def step(self, tokens: Sequence[int]) -> Tensor:
            assert all(0 <= own < 10 for own in tokens)
            self.at += 1
            return self.logits()

        def logits(self) -> Tensor:
            out = torch.zeros(3, 10)
            out[:, 3] = 1.0
            if self.at == step:
                out[row, token] = number
            return out

        def nbytes(self, row: int) -> int:
            return 0

        stored_bytes = nbytes

    decoding = Scripted(None, [], 3)  # type: ignore[arg-type]
    decoding.caches = [_Weightless()]  # type: ignore[list-item]
    found = decoding.greedy(decoding.logits(), Limits(5, frozenset({99})))  # 99 is beyond the vocabulary
    assert [len(own.tokens) for own in found] == [step if at == row else 5 for at in range(3)]
    assert [own.flaw is None for own in found] == [at != row for at in range(3)]
    tried("logits while decoding", lambda: _raised(found[row].flaw))


class _Weightless:
    stored, position = (0, 0, 0), 0

    def keep(self, rows: Sequence[int]) -> None: ...

    def read_bytes(self, row: int) -> None: ...

    def check(self) -> None: ...


def _raised(error: Exception | None) -> None:
    assert error is not None
    raise error


@dataclass(frozen=True)
class Spoilt(EvictionPolicy):
    """The last token of each head is worth `number`."""

    number: float = math.nan

    def score(self, view: LayerView) -> Tensor:
        scores = view.kv.keys.norm(dim=-1)
        scores[..., -1] = self.number
        return scores


@pytest.mark.parametrize("number", NUMBERS)
def test_a_method_of_such_scores_fails_alone(model: AttachedModel, number: float) -> None:
    bad, good = run(model, [Cell(Spoilt(number=number), Budget(tokens=6)), OTHER])
    refused("scores of a method", bad, "2 of 48 scores of layer 0 are NaN or infinite; mend the method")
    assert good.status == "ok"


@pytest.mark.parametrize("method", ["h2o@paper", "tova@paper", "compilerkv@streaming"])
def test_decode_weights_that_are_no_numbers_fail_their_cell(
    model: AttachedModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*args: Any, **kwargs: Any) -> Tensor:
        return slot_weights(*args, **kwargs) * math.nan

    monkeypatch.setattr("harness.engine.kernels.slot_weights", nothing)
    outcome = run(model, [Cell(make_policy(method), Budget(tokens=9))])[0]
    refused("weights while decoding", outcome, "attention weights of the token at 23 are NaN")


@pytest.mark.parametrize("label", ["h2o", "compilerkv", "h2o@kvcf"])
def test_column_sums_that_are_no_numbers_fail_their_cell(
    model: AttachedModel, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "harness.engine.prefill.column_sums", lambda *args, **kwargs: column_sums(*args, **kwargs) * math.nan
    )
    bad, good = run(model, [Cell(make_policy(label), Budget(tokens=18)), OTHER])
    refused("column sums", bad, "of layer 0 are NaN or infinite")
    assert good.status == "ok"


def test_token_ids_that_a_model_has_no_embedding_of_fail_their_prompt(model: AttachedModel) -> None:
    for unknown in (10**6, -1, 2**40):
        refused("unknown token ids", run(model, [FULL], ids=[*IDS[:5], unknown, *IDS[5:]])[0], f"token id {unknown}")
        refused("unknown token ids", run(model, [FULL], answer=(7, unknown))[0], f"token id {unknown} is none")


NO_COUNT = [-1, True, False, 2.5, "x", "5", None, "\x1b[31m", [5], math.nan, -(10**5000), b"5", "9" * 5000]
WRONG_LIMITS: dict[str, list[Any]] = {
    "max_new_tokens": NO_COUNT,
    "min_new_tokens": NO_COUNT,
    "stop": ["x", "\n", [""], ("a", ""), ("a", 3), [None], [b"a"], [["a"]]],
    "eos_ids": [own for value in NO_COUNT if not isinstance(value, list) for own in ([value], (0, value))],
    "text": [None],
}


@pytest.mark.parametrize("name", WRONG_LIMITS)
def test_limits_of_another_type_are_one_line(name: str) -> None:
    for value in WRONG_LIMITS[name]:
        given: dict[str, Any] = {"max_new_tokens": 5, "eos_ids": frozenset(), "stop": ("a",), "text": str, name: value}
        tried("limits of a generation", lambda given=given: Limits(**given))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["query", "first_token"])
@pytest.mark.parametrize("value", ["", "awre", "Prefill", None, True, 5, b"prefill", ["prefill"], "\x1b[31m" * 999])
def test_an_engine_takes_no_other_mode(model: AttachedModel, name: str, value: Any) -> None:
    tried("modes of an engine", lambda: Engine(model, **{name: value}))


@pytest.mark.parametrize("context", [-1, 25, True, 2.0, "a", None, 10**30])
def test_a_context_that_is_no_part_of_the_prompt_is_one_line(context: Any) -> None:
    tried("context of a prompt", lambda: Prompt(IDS, context, (), Limits(5, frozenset())))


def test_attention_that_methods_see_is_finite_in_half_precision() -> None:
    """Products of queries and keys pass 65,504 before they are scaled, as in Qwen2; the model's own does not mind."""
    draw = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, heads, 40, 8, generator=draw) for heads in (4, 2, 2))
    for factor in (1.0, 300.0, 5000.0):
        half = [(x * factor).half() for x in (queries, keys)]
        exact, mask = [x.float() for x in half], torch.ones(1, 2, 1, 40, dtype=torch.bool)
        wanted, found = (slot_weights(q[:, :, -1:], k, Form(0.35), mask=mask) for q, k in (exact, half))
        assert torch.equal(wanted, found) and bool(found.isfinite().all())
        streamed = [column_sums(q, k, None, Form(0.35)) for q, k in (exact, half)]
        assert torch.equal(*streamed) and bool(((streamed[0].sum(dim=-1) - 40).abs() < 1e-3).all())
        lse = causal_attention(*half, values.half(), Form(0.35))[1]
        fused = column_sums(*half, lse, Form(0.35))
        assert bool(fused.isfinite().all()) and (factor > 1 or torch.allclose(fused, streamed[0], atol=0.05))


def test_methods_that_look_at_each_step_see_finite_weights_in_half_precision() -> None:
    """As `slot_weights`, on a whole model whose keys and queries have a large common part."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 261}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    own = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).eval()
    with torch.no_grad():
        for layer in own.model.layers:
            common = torch.zeros(2, 16)
            common[:, 7] = common[:, 15] = 280.0  # the slowest pair of RoPE: a large part that position hardly turns
            layer.self_attn.k_proj.bias.copy_(common.flatten())
            layer.self_attn.q_proj.bias.copy_(common.repeat_interleave(2, 0).flatten())
    half = AttachedModel(own.half())
    seen: list[bool] = []

    class Spy(type(make_policy("tova"))):  # type: ignore[misc]
        def after_step(self, step: StepView) -> Tensor:
            assert step.attention is not None
            seen.append(bool(step.attention.isfinite().all()))
            return super().after_step(step)  # type: ignore[no-any-return]

    labels = ["snapkv", "h2o", "h2o@paper", "expected_attention", "compilerkv", "compilerkv@paper", "quant@snapkv-int4"]
    cells = [Cell(make_policy(label), Budget(tokens=12)) for label in labels]
    outcomes = run(half, [Cell(Spy(evict=True), Budget(tokens=12)), *cells])
    assert [(own.status, own.error) for own in outcomes] == [("ok", None)] * 8
    assert seen and all(seen)
