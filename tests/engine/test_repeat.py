"""The second pass over a prompt: what keys get in it, and that nothing of it stays."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from harness.engine.engine import Engine
from harness.engine.prefill import Prefilled, prefill
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.models.tiny import CHAT_TEMPLATE
from harness.models.wording import Wording, wording
from methods.base import Budget, KVPolicy, Needs, PolicyError
from methods.registry import make_policy
from methods.repeat import WHOLE, Repeat, Repeated, repeated
from tests.engine import test_mixed_models as mixed
from tests.engine import test_transformers_seam as seam
from tests.engine.repeats import CLOSED, HEAD, TEXT, encode, gold

ASKED = Repeat(chunk=24)
BARE = Repeat(words=False, chunk=30, apart=False)
KINDS = [ASKED, replace(ASKED, sinks=1), replace(ASKED, apart=False), replace(ASKED, normed=True), BARE]
WINDOWED = [name for name, (*_, windows) in seam.MODELS.items() if windows]


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model), tiny.wording)


@pytest.fixture(scope="module")
def plain(tiny: LoadedModel) -> PreTrainedModel:
    own = copy.deepcopy(tiny.model)
    own.set_attn_implementation("eager")
    return own


def passed(model: AttachedModel, ids: list[int], *asked: Repeat, chunk: int | None = None) -> Prefilled:
    return prefill(model, ids, Needs(repeat=frozenset(asked)), chunk=chunk)


def seen(model: AttachedModel, ids: list[int], asked: Repeat, chunk: int | None = None) -> list[Repeated]:
    return [repeated(layer, asked) for layer in passed(model, ids, asked, chunk=chunk).view.layers]


@pytest.mark.parametrize("asked", KINDS, ids=str)
@pytest.mark.parametrize("step", [None, 17])
@pytest.mark.parametrize("closed", [False, True])
def test_keys_get_what_transformers_attention_pays_them(
    tiny: LoadedModel, model: AttachedModel, plain: PreTrainedModel, asked: Repeat, step: int | None, closed: bool
) -> None:
    ids = encode(tiny, HEAD + TEXT + (f"{CLOSED}So" if closed else ""))
    found, expected = seen(model, ids, asked, step), gold(tiny, plain, ids, asked)
    span = (2, 2 + len(TEXT)) if asked.words else (0, len(ids))
    for own, told in zip(found, expected, strict=True):
        assert torch.allclose(own.received[0].flatten(0, 1), told, atol=2e-5)
        assert (own.start, own.end) == span


def test_passes_of_several_kinds_do_not_disturb_each_other(tiny: LoadedModel, model: AttachedModel) -> None:
    ids = encode(tiny, HEAD + TEXT)
    together = passed(model, ids, *KINDS).view.layers
    for asked in KINDS:
        for layer, alone in zip(together, seen(model, ids, asked), strict=True):
            assert torch.equal(repeated(layer, asked).received, alone.received)


def test_nothing_of_a_pass_stays(tiny: LoadedModel, model: AttachedModel) -> None:
    ids = encode(tiny, HEAD + TEXT)
    before, after = passed(model, ids), passed(model, ids, ASKED)
    assert torch.equal(before.logits, after.logits)
    for a, b in zip(before.layers, after.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) and a.seen == b.seen == len(ids)
    assert after.clock.seconds("observe") > 10 * before.clock.seconds("observe")
    assert after.clock.seconds("prefill") > after.clock.seconds("observe")


@pytest.mark.parametrize("name", [*mixed.MODELS, *WINDOWED])
def test_layers_of_every_kind_answer_as_after_the_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk, fed after the prompt, is what the plain model makes of both."""
    plain, model = (mixed if name in mixed.MODELS else seam).pair(name)
    ids, found = list(seam.prompt(30).ids), []
    forward = model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(forward(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(model, "forward", noted)
    shown = passed(model, ids, replace(BARE, chunk=17))
    for logits, fed in zip(found[-2:], (ids[:17], ids[17:]), strict=True):
        with torch.no_grad():
            assert torch.allclose(logits[:, -1], plain(torch.tensor([ids + fed])).logits[:, -1], atol=2e-4)
    for layer in shown.view.layers:
        assert bool((repeated(layer, replace(BARE, chunk=17)).received.amax(dim=(1, 2)) > 0).all())


def test_a_pass_that_fails_fails_those_who_asked_for_it(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = encode(tiny, HEAD + TEXT)
    model = AttachedModel(copy.deepcopy(tiny.model), tiny.wording)
    forward = model.forward

    def full(*args: Any, position: int, **kwargs: Any) -> Any:
        if position:
            raise MemoryError("no room for a second pass")
        return forward(*args, position=position, **kwargs)

    monkeypatch.setattr(model, "forward", full)
    cells = [Cell(make_policy(name), Budget(tokens=20)) for name in ("kvzip", "knorm")]
    runs, _ = Engine(model).compress_cells(ids, cells)
    one, other = (runs[cell].outcome for cell in cells)
    assert (one.status, one.error) == ("oom", "MemoryError: no room for a second pass")
    assert (other.status, sum(other.kept_slots)) == ("ok", 20 * 4 * 2)


def test_what_was_not_asked_for_is_reported(tiny: LoadedModel, model: AttachedModel) -> None:
    view = passed(model, encode(tiny, TEXT)).view
    with pytest.raises(PolicyError, match="the prompt was not repeated; declare it in needs"):
        repeated(view.layers[0], ASKED)


def test_a_model_without_a_tokenizer_refuses_words_alone(tiny: LoadedModel) -> None:
    bare = AttachedModel(copy.deepcopy(tiny.model))
    with pytest.raises(HarnessError, match="KVzip has the prompt repeated in words; the model's tokenizer is unknown"):
        Engine(bare).check([make_policy("kvzip")], range(8))
    with pytest.raises(HarnessError, match="repeated in words"):
        passed(bare, encode(tiny, TEXT), ASKED)
    assert seen(bare, encode(tiny, TEXT), BARE)[0].end == len(TEXT)


def test_layers_compressed_on_the_way_are_refused(tiny: LoadedModel, model: AttachedModel) -> None:
    acts = [lambda layer: layer.kv] * 4
    with pytest.raises(HarnessError, match="compressed on the way"):
        prefill(model, encode(tiny, TEXT), Needs(repeat=frozenset({ASKED})), acts=acts)


def test_needs_of_several_policies_name_every_pass() -> None:
    both = Needs(window=4, repeat=frozenset({ASKED})) | Needs(column_sums=True, repeat=frozenset({BARE}))
    assert both == Needs(window=4, column_sums=True, repeat=frozenset({ASKED, BARE}))
    assert KVPolicy().needs.repeat == frozenset() and WHOLE > 10**6


def test_words_stand_in_the_chat_template(tiny: LoadedModel) -> None:
    words = tiny.wording
    assert tiny.tokenizer.decode(words.opening) == HEAD
    assert tiny.tokenizer.decode(words.going_on.whole) == "\n\nRepeat the previous context exactly."  # type: ignore[union-attr]
    assert tiny.tokenizer.decode(words.anew.part).startswith("<|end|><|user|>Repeat the part")  # type: ignore[union-attr]
    opened, raw = encode(tiny, HEAD + TEXT), encode(tiny, f"<|bos|>{TEXT}")
    assert words.span(opened) == (2, len(opened), words.going_on)
    assert words.span([*opened, *encode(tiny, f"{CLOSED}It is")]) == (2, len(opened), words.anew)
    assert words.span(raw) == (1, len(raw), words.raw) and words.span(raw[1:])[:2] == (0, len(TEXT))
    for short in (opened[:1], opened[:2], raw[:1]):
        assert words.span(short)[:2] == (0, len(short))


@pytest.mark.parametrize("template", [None, "nothing of it"])
def test_a_template_that_shows_no_message_counts_for_none(tiny: LoadedModel, template: str | None) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    ids = encode(tiny, HEAD + TEXT)
    made = wording(tokenizer)
    assert made == Wording(tiny.wording.raw, (1,)) and made.span(ids) == (1, len(ids), made.raw)


def test_a_template_of_one_message_is_asked_within_it(tiny: LoadedModel) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = f"{{% if messages[1:] %}}{{{{ raise_exception('one') }}}}{{% endif %}}{CHAT_TEMPLATE}"
    made, ids = wording(tokenizer), encode(tiny, HEAD + TEXT + CLOSED)
    assert made == replace(tiny.wording, anew=None) and made.span(ids) == (2, len(ids), made.going_on)
