"""What a caller of `attached` may get wrong: arguments by type and value, masks, positions, options of `generate`."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from harness import attached
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.errors import checked
from harness.generate.asked import Arguments, rows_of
from harness.models.load import LoadedModel
from methods.base import Budget
from methods.registry import make_policy
from tests.hostile import tried

pytestmark = pytest.mark.hostile

IDS = torch.randint(5, 250, (1, 40), generator=torch.Generator().manual_seed(1))
SHORT: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SIZES: dict[str, Any] = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "initializer_range": 0.2}
SIZES |= {"eos_token_id": None, "bos_token_id": None}


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> PreTrainedModel:
    return copy.deepcopy(tiny.model)


def enter(model: Any, **arguments: Any) -> Callable[[], None]:
    def attempt() -> None:
        with attached(model, **{"method": "snapkv", "budget": 8, **arguments}):
            pass

    return attempt


class Odd:
    def __repr__(self) -> str:
        return "odd\x1b[31m\nodd" * 300


NO_TEXT: list[Any] = [None, 5, True, 2.5, b"snapkv", ["snapkv"], Odd(), math.nan, ("compressed",), {}]
WRONG: dict[str, list[Any]] = {
    "method": [*NO_TEXT, "", " ", "snapvk", "@", "snapkv[", "\x1b[31m", "x" * 10_000, "\ud800", "a:b"],
    "budget": [
        *(True, False, None, 0, -1, -(10**5000), 0.0, -0.5, 1.5, 64.0, math.nan, math.inf, -math.inf, 1e308, 5j, b"8"),
        *(
            "",
            " ",
            "many",
            "0",
            "-5",
            "1.5",
            "0%",
            "150%",
            "%",
            "nan",
            "1e3",
            "8 8",
            "\x00",
            "9" * 5000 + "x",
            "\ud800",
        ),
        *([8], (8,), {8}, {}, Odd(), torch.tensor([8, 9]), torch.tensor(8), np.array([8]), Budget(tokens=8), object),
    ],
    "first_token": [*NO_TEXT, "", "compresed", "Compressed", "prefil", "compressed ", "\x1b", "\ud800", "x" * 10_000],
    "params": [*(value for value in NO_TEXT if value is not None), "kernel=5", {5: 5}, {None: 1}, {"kernal": 5}],
    "revision": [value for value in NO_TEXT if not isinstance(value, str)],
}
WRONG["params"] = [value for value in WRONG["params"] if value != {}]
WRONG["params"] += [{"kernel": value} for value in (4, 0, "5", 2.5, None, True, math.nan, [5], Odd())]


@pytest.mark.parametrize("name", WRONG)
def test_each_argument_of_another_type_or_value_is_one_line(model: PreTrainedModel, name: str) -> None:
    for value in WRONG[name]:
        tried(f"attached({name}=...)", enter(model, **{name: value}))


@given(first=st.text(max_size=12) | st.binary(max_size=4) | st.integers() | st.floats() | st.none() | st.booleans())
def test_no_other_first_token_is_taken(first: Any) -> None:
    assume(first not in ("compressed", "prefill"))
    asked = {"method": "snapkv", "budget": 8, "first_token": first, "params": None, "revision": ""}
    tried("attached(first_token=...)", lambda: checked(Arguments, asked))


def test_numbers_of_numpy_and_texts_are_budgets(model: PreTrainedModel) -> None:
    for budget, tokens in ((np.int64(8), 8), (np.float64(0.2), 8), ("8", 8), ("20%", 8), (0.2, 8), (1e-9, 1)):
        with attached(model, method="knorm", budget=budget) as report:
            model.generate(IDS, **SHORT)
        assert report.rows[0].budget_tokens == tokens


def test_what_is_no_model_that_generates_is_one_line(model: PreTrainedModel) -> None:
    headless = LlamaModel(LlamaConfig(**SIZES))
    for thing in (headless, None, "tiny", torch.nn.Linear(2, 2), type(model), model.state_dict(), 5):
        tried("attached(model)", enter(thing))


def generating(model: PreTrainedModel, ids: Any = IDS, **options: Any) -> Callable[[], None]:
    def attempt() -> None:
        with attached(model, method="snapkv", budget=8):
            model.generate(ids, **{**SHORT, **options})

    return attempt


def test_options_that_need_positions_or_a_cache_of_their_own_are_one_line(model: PreTrainedModel) -> None:
    places = torch.arange(40)[None]
    options: list[dict[str, Any]] = [
        *({"position_ids": own} for own in (places, 2 * places, places[:, :7], [1, 2], 5, "x", places.float())),
        *({"cache_position": own} for own in (places[0], places[0] + 3, 0)),
        {"token_type_ids": torch.ones_like(IDS)},
        *({"num_beams": own} for own in (2, torch.tensor([1, 2]), [1], "2", Odd())),
        *({"use_cache": False}, {"output_attentions": True}, {"past_key_values": ()}, {"inputs_embeds": places}),
        *({"cache_implementation": own} for own in ("static", "offloaded", "\x1b[31m", 5)),
    ]
    for own in options:
        tried("options of generate", generating(model, **own))


@given(st.lists(st.booleans(), min_size=2, max_size=9), st.sampled_from([torch.int64, torch.float32, torch.bool]))
def test_a_mask_is_taken_where_it_pads_the_left_and_named_for_what_it_is_else(bits: list[bool], dtype: Any) -> None:
    mask, ids = torch.tensor([bits]).to(dtype), torch.arange(len(bits))[None] + 5
    text = "".join("01"[bit] for bit in bits)
    bare = text.lstrip("0")
    if bare and "0" not in bare:
        assert rows_of(ids, mask, None) == [ids[0, len(bits) - len(bare) :].tolist()]
        return
    line = tried("attention masks", lambda: rows_of(ids, mask, None))
    wanted = "no token" if not bare else "hole" if "0" in bare.rstrip("0") else "padded on the right"
    assert wanted in line


MASKS: list[Any] = [
    *(torch.ones(1, 39), torch.ones(1, 41), torch.ones(2, 40), torch.ones(40), torch.ones(1, 1, 40, 40)),
    *(torch.full((1, 40), own) for own in (2, -1, 0.5, math.nan, math.inf)),
    *((torch.arange(40) % own != 0).long()[None] for own in range(2, 20)),
    torch.zeros(1, 40),
]


def test_masks_of_other_shapes_and_numbers_are_one_line() -> None:
    for mask in MASKS:
        tried("attention masks", lambda mask=mask: rows_of(IDS, mask, None))  # type: ignore[misc]
    for before in (torch.zeros(1, 30).bool(), torch.ones(1, 29).bool(), torch.ones(2, 30).bool()):
        tried("attention masks", lambda seen=before: rows_of(IDS[:, 30:], torch.ones(1, 40), seen))  # type: ignore[misc]
    assert rows_of(IDS[:, 30:], torch.ones(1, 40), torch.ones(1, 30).bool()) == [IDS[0, 30:].tolist()]


def test_a_hole_or_a_changed_mask_is_refused_by_generate_too(model: PreTrainedModel) -> None:
    hole = torch.ones_like(IDS)
    hole[0, 20:25] = 0
    line = tried("attention masks", generating(model, attention_mask=hole))
    assert "row 0 has a hole at column 20" in line and "right" not in line
    with attached(model, method="fullkv"):
        first: Any = model.generate(IDS, **SHORT, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, IDS[:, :3]], dim=1)
        other = torch.ones_like(longer)
        other[0, :4] = 0
        held = {"past_key_values": first.past_key_values, "attention_mask": other}
        tried("attention masks", lambda: model.generate(longer, **SHORT, **held))


def test_tokens_that_the_model_does_not_know_and_empty_prompts_are_one_line(model: PreTrainedModel) -> None:
    for unknown in (261, 10**6):
        tried("unknown token ids", generating(model, torch.cat([IDS, torch.tensor([[unknown]])], dim=1)))


def test_logits_that_are_no_numbers_end_a_generation_by_name(tiny: LoadedModel) -> None:
    broken = copy.deepcopy(tiny.model)
    with torch.no_grad():
        broken.get_parameter("model.norm.weight").fill_(math.nan)
    assert "are NaN or infinite" in tried("logits of the prompt", generating(broken))


@pytest.mark.parametrize(
    "method", ["compilerkv", "headkv", "snapkv@compiled", "protect@compilerkv", "compilerkv@paper"]
)
def test_a_method_without_its_tables_warns_aloud(model: PreTrainedModel, method: str) -> None:
    with pytest.warns(UserWarning, match=f"{method}: no tables for this model: .*give revision=loaded.spec.revision"):
        enter(model, method=method)()


def phi3(windows: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = Phi3Config(**{**SIZES, "max_position_embeddings": 256, "sliding_window": windows, **changes})
    return Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("window", [256, 257, 100_000])
def test_a_window_no_shorter_than_the_context_is_full_attention(window: int) -> None:
    wide, none = phi3(window), phi3(None)
    with attached(wide, method="snapkv", budget=8) as report:
        found = wide.generate(IDS, **SHORT)
    with attached(none, method="snapkv", budget=8) as gold:
        assert torch.equal(none.generate(IDS, **SHORT), found)
    assert report.rows == gold.rows and len(report.rows[0].kept_slots) == 3
    long = torch.randint(5, 250, (1, window + 1)) if window < 300 else IDS
    if window < 300:
        assert "shorten the prompt" in tried("beyond the window", generating(wide, long))


@pytest.fixture
def dynamic() -> Any:
    """A model whose RoPE scales with the longest text so far."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=48, rope_parameters=rope)).eval()


def test_a_rope_that_scales_with_length_answers_alike_whatever_came_before(dynamic: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 250, (1, tokens), generator=draw) for tokens in (90, 48, 30)]
    gold = [copy.deepcopy(dynamic).generate(ids, **{**SHORT, "max_new_tokens": 9}) for ids in prompts]
    engine = Engine(AttachedModel(copy.deepcopy(dynamic)))
    cells = [Cell(make_policy("fullkv"), None), Cell(make_policy("h2o@paper"), Budget(tokens=20))]
    for ids, whole in zip(prompts, gold, strict=True):
        with attached(dynamic, method="fullkv"):
            assert torch.equal(dynamic.generate(ids, **{**SHORT, "max_new_tokens": 9}), whole)
        assert torch.equal(dynamic.generate(ids, **{**SHORT, "max_new_tokens": 9}), whole)  # nothing is left behind
        prompt = Prompt(ids[0].tolist(), 20, (7, 8, 9), Limits(9, frozenset()))
        outcomes = engine.run(prompt, cells)
        alone = [Engine(AttachedModel(copy.deepcopy(dynamic))).run(prompt, [cell])[0] for cell in reversed(cells)]
        assert list(outcomes[0].token_ids) == whole[0, ids.shape[1] :].tolist()
        assert [own.token_ids for own in outcomes] == [own.token_ids for own in reversed(alone)]
