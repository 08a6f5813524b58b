"""Any press of the installed kvpress as a policy: `kvpress:KnormPress`, `kvpress:AdaKVPress(SnapKVPress())`.

The only file that imports kvpress (github.com/NVIDIA/kvpress, read at 0.5.5). A press is a forward hook on attention
modules. Here the hook of every layer runs once after the prefill, on a copy of that layer's cache and on the hidden
states that went into it; what it leaves is told slot by slot.
- Ratio: a press asks for a share to drop. The share is searched until the slots left, counted after the press's own
  rounding and layer allotment, are the most that the budget allows.
- Masked keys: AdaKV, CriticalAdaKV, DuoAttention and DMS keep every slot and give masked ones no weight when they
  decode. An absent slot has no weight either, so here those slots are dropped: the same attention, and memory freed.
- ThinK zeroes channels and keeps every slot: `simulated`, at its full bytes.
- A press whose work is not in the prefill hook is refused: one that decodes, or runs the prompt again.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

import torch

from harness.kvpress.label import REMEDY, PressCall, parse_press, usable_version
from harness.kvpress.slots import Tracked
from methods.base import KV, KVPolicy, LayerView, Needs, PolicyError, PromptView, Sizes
from methods.label import nearest
from methods.views import LayerSource

WHOLE = 2**31  # a window as long as any prompt
SIMULATED = {"ThinKPress": "zeroes key channels and keeps every slot"}
ATTENTION = {"ObservedAttentionPress"}  # presses that read the whole attention matrix
OUTSIDE = "runs the prompt again or acts while decoding"
ATTEMPTS = 12  # of the search for a ratio


@dataclass(frozen=True)
class Press(KVPolicy):
    """A press of kvpress. press: its name and parameters, as in a label after `kvpress:`."""

    press: str

    @property
    def needs(self) -> Needs:
        return Needs(window=WHOLE if self._has(ATTENTION) else 0, hidden_states=True)

    @property
    def memory(self) -> Literal["physical", "simulated"]:
        return "simulated" if self._has(SIMULATED) else "physical"

    def provenance(self) -> dict[str, Any]:
        """Return versions, and every parameter with its default filled in."""
        parameters = _json(build(self.press))
        return {"kvpress": version("kvpress"), "transformers": version("transformers"), "parameters": parameters}

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        press = build(self.press)
        names = [type(own).__name__ for own in _nested(press)]
        found = [f"simulated: {name} {SIMULATED[name]}" for name in names if name in SIMULATED]
        if not _set_ratio(press, 0.5):
            found.append("this press takes no ratio: it ran as given, whatever the budget")
        return tuple(found)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        press = build(self.press)
        sources = [_source(layer) for layer in view.layers]
        with _rotary(sources):
            press.post_init_from_model(sources[0].model)
            act = _act(press, view)
            if not _set_ratio(press, 0.5):
                return act(None)
            return fit(act, budget, view.tokens)

    def _has(self, names: Any) -> bool:
        return any(type(press).__name__ in names for press in _nested(build(self.press)))


def make_press(text: str, overrides: Mapping[str, Any]) -> Press:
    """Return the policy of a label's part after `kvpress:`. Raises PolicyError for what kvpress does not know."""
    if overrides:
        raise PolicyError(f"a press takes its parameters in its label; write kvpress:{text.partition('(')[0]}(...)")
    call = parse_press(text)
    press = build(str(call))
    for own in _nested(press):
        if type(own).__call__ is not _kvpress().BasePress.__call__ or getattr(own, "decoding", False):
            raise PolicyError(f"{type(own).__name__} {OUTSIDE}, which is not supported; choose a press that scores")
    return Press(str(call))


def build(text: str) -> Any:
    """Return a new press, with nothing left of other prompts. Raises PolicyError for an unknown name or parameter."""
    return _build(parse_press(text), _presses())


def _build(call: PressCall, known: Mapping[str, Any]) -> Any:
    if call.name not in known:
        raise PolicyError(f"unknown press {call.name!r}{nearest(call.name, known)}")
    allowed = list(inspect.signature(known[call.name]).parameters)
    for key, _ in call.keywords:
        if key == "compression_ratio":
            raise PolicyError(f"{call.name}: the budget decides compression_ratio; leave it out")
        if key not in allowed:
            raise PolicyError(f"{call.name} has no parameter {key!r}{nearest(key, allowed)}")
    if call.args and allowed[:1] == ["compression_ratio"]:
        raise PolicyError(f"{call.name}: the budget decides compression_ratio; name the other parameters")
    made = [_argument(value, known) for value in call.args]
    named = {key: _argument(value, known) for key, value in call.keywords}
    try:
        return known[call.name](*made, **named)
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        raise PolicyError(f"{call} is refused by kvpress: {' '.join(str(error).split()) or 'no reason'}") from None


def _argument(value: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_argument(item, known) for item in value]
    return _build(value, known) if isinstance(value, PressCall) else value


def _kvpress() -> Any:
    """The package. Raises PolicyError, with the remedy, when it is missing or does not load."""
    found = usable_version()
    try:
        import kvpress
    except (ImportError, AttributeError) as error:
        raise PolicyError(f"kvpress {found} does not load ({' '.join(str(error).split())}); {REMEDY}") from None
    return kvpress


def _presses() -> dict[str, Any]:
    package = _kvpress()
    known = {name: getattr(package, name) for name in package.__all__ if name not in ("BasePress", "ScorerPress")}
    return {name: c for name, c in known.items() if isinstance(c, type) and issubclass(c, package.BasePress)}


def _nested(press: Any) -> Iterator[Any]:
    """`press` and the presses that it holds."""
    yield press
    for value in vars(press).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, _kvpress().BasePress):
                yield from _nested(item)


def _json(value: Any) -> Any:
    """A press as its name with every parameter, presses inside it likewise; the ratio is the budget's."""
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if is_dataclass(value) and isinstance(value, _kvpress().BasePress):
        names = [f.name for f in fields(value) if f.init and f.name != "compression_ratio"]
        return {type(value).__name__: {name: _json(getattr(value, name)) for name in names}}
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _set_ratio(press: Any, ratio: float) -> bool:
    """Have `press` drop this share of the slots. False for one that decides by itself."""
    if type(press).__name__ == "ComposedPress":  # its own ratio is only reported
        return sum(_set_ratio(inner, ratio) for inner in press.presses) > 0
    if not hasattr(type(press), "compression_ratio"):
        return False
    try:
        press.compression_ratio = ratio
    except AttributeError:
        return False
    return True


def _source(layer: LayerView) -> LayerSource:
    if layer.source is None:
        raise PolicyError("a press needs hidden states, which were not observed here; use `harness run`")
    return layer.source


@contextmanager
def _rotary(sources: Sequence[LayerSource]) -> Iterator[None]:
    """The model's rotary embedding on every attention module, where presses look for it."""
    inner = getattr(sources[0].model, "model", sources[0].model)
    rotary = getattr(getattr(inner, "language_model", inner), "rotary_emb", None)
    lent: list[Any] = [s.module for s in sources if not hasattr(s.module, "rotary_emb")]
    for module in lent:
        module.rotary_emb = rotary
    try:
        yield
    finally:
        for module in lent:
            del module.rotary_emb


def _act(press: Any, view: PromptView) -> Callable[[float | None], list[KV]]:
    """What the press leaves of every layer at a ratio; None where it takes none. Draws are the same every time."""
    whole = any(type(own).__name__ in ATTENTION for own in _nested(press))

    def act(ratio: float | None) -> list[KV]:
        if ratio is not None:
            _set_ratio(press, ratio)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [hooked(press, layer, whole=whole) for layer in view.layers]

    return act


def hooked(press: Any, layer: LayerView, *, whole: bool = False) -> KV:
    """Return what the press's hook leaves of one layer. whole: it is shown the whole attention, [B, Hq, T, T]."""
    source, kv = _source(layer), layer.kv
    module: Any = source.module
    at = torch.arange(layer.tokens, device=kv.keys.device)
    own = SimpleNamespace(keys=kv.keys.clone(), values=kv.values.clone())
    given: dict[str, Any] = {"hidden_states": source.hidden, "position_embeddings": source.rope, "attention_mask": None}
    given |= {"past_key_values": SimpleNamespace(layers={module.layer_idx: own})}
    given |= {"cache_position": at, "position_ids": at.unsqueeze(0)}
    seen = layer.attention(layer.tokens).flatten(1, 2).to(kv.keys.dtype) if whole else None
    module.masked_key_indices = None
    with Tracked(own.keys, own.values) as tracked:
        press.forward_hook(module, [], given, [None, seen])
    masked, module.masked_key_indices = module.masked_key_indices, None
    positions = tracked.positions(own.keys, own.values, kv)
    if positions is None:
        name = type(press).__name__
        raise PolicyError(f"{name} changes keys and values so that the tokens left cannot be told; it is unsupported")
    if masked is not None:
        positions = positions.clone()
        positions[tuple(x.to(at.device) for x in masked)] = -1
    kv = KV(
        own.keys, own.values, positions
    )  # now in the order of tokens, without columns that are empty for every head
    order = positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).argsort(dim=-1)
    return kv.take(order[..., : int(kv.live.max())])


def fit(act: Callable[[float | None], list[KV]], budget: int, tokens: int) -> list[KV]:
    """Return what `act` leaves at the ratio that keeps the most slots within `budget` per layer and head.

    Where no ratio keeps so few, the fewest that were seen. Slots grow by steps with what is asked for, so the search
    ends when a step lies between two ratios half a token apart.
    """
    low, high, asked = 0.0, float(tokens), float(budget)
    tried: list[tuple[int, list[KV]]] = []
    for _ in range(ATTEMPTS):
        left = act(1 - asked / tokens)
        heads = sum(kv.live.numel() for kv in left)
        over = sum(int(kv.live.sum()) for kv in left) - heads * budget
        tried.append((over, left))
        low, high = (low, asked) if over > 0 else (asked, high)
        if over == 0 or high - low < 0.5:
            break
        short = asked == budget and over < 0  # a press that rounds down loses a slot to the last bit of the ratio
        guess = asked + 1e-6 if short else asked - over / heads
        asked = guess if low < guess < high else (low + high) / 2
    return min(tried, key=lambda found: (found[0] > 0, abs(found[0])))[1]  # too many are worse than too few
