"""The page of every method of this folder, from its docstrings, the registry and measured bytes.

`make docs` writes it to docs/method-reference.md. Nothing in it is written by hand but what its head says.
"""

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch

from harness.contract import make_view
from methods.base import KV, KVPolicy, Needs, PolicyError
from methods.budget import BudgetTooSmall
from methods.codes import MinMaxCodes
from methods.registry import Method, load_methods, make_policy
from methods.slotwise import SlotCodes
from methods.stored import CodedKV
from methods.tuned.artefact import load_tuning, packaged
from methods.views import POSITION_BYTES

DIM, DTYPE = 64, torch.bfloat16
PLAIN = f"2 x D x {DTYPE.itemsize} + {POSITION_BYTES} = {2 * DIM * DTYPE.itemsize + POSITION_BYTES}"
PROMPT, BUDGETS = 2048, (128, 256, 512)
"""Tokens of the prompt that bytes are measured on, and budgets where they depend on it."""

HEAD = f"""# Every method

[README](../README.md) · [Methods](methods.md) · [CompilerKV](compilerkv.md) · [How to add
one](../CONTRIBUTING.md#add-a-method)

Written by `make docs` from the files of `methods/`; change those. A result names its method as `name`, or
`name@preset` ([what presets are called](methods.md#presets)); `--set name.parameter=value` changes one parameter.

- **Observes** is what the engine gathers during the prefill, of the policy as it is made without a model: compiled
  tables may ask for more.
- **Bytes of a slot**, of one KV head: measured on a random prompt of {PROMPT} tokens at D = {DIM} in {str(DTYPE)[6:]}
  (D: size of a head), where a plain slot, a key, a value and its position, takes
  {PLAIN}. The full cache needs no positions and takes {POSITION_BYTES} less, however it is coded.
- An empty cell of a preset is the default.
"""

LABEL = re.compile(r"(?:^|(?<=\s))(Source|(?:Deliberate d|D)ifferences?):\s")
CODE = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+) at (\w+)")
OBSERVED: dict[str, Callable[[Any], str]] = {
    "window": lambda own: "the last query" if own == 1 else f"the last {own} queries",
    "column_sums": lambda _: "the attention of the whole prompt",
    "logprobs": lambda _: "log-probabilities of those tokens",
    "decode_attention": lambda _: "the attention while decoding",
    "hidden_states": lambda _: "hidden states",
    "module": lambda _: "the weights of attention",
    "stretch": lambda own: f"{own} tokens at a time",
    "repeat": lambda own: "a second pass over the prompt" if len(own) == 1 else f"{len(own)} passes over the prompt",
}
"""Words for each field of `Needs`, from its value."""


def reference() -> str:
    """Return the page: a table of all methods, then a section for each in alphabetical order. It ends with a line."""
    found = built_in()
    rows = [(f"[`{name}`](#{name})", method.summary) for name, method in found.items()]
    return "\n".join([HEAD, *_table(("method", "what it keeps"), rows), *map(section, found.values())])


def built_in() -> dict[str, Method]:
    """Return the methods of this folder by name, in alphabetical order: no plugin's."""
    return {name: own for name, own in sorted(load_methods().items()) if own.policy.__module__.startswith("methods.")}


def section(method: Method) -> str:
    """Return what is known of one method, under a heading of its name."""
    said = paragraphs(import_module(method.policy.__module__).__doc__ or "")
    described = " ".join((method.policy.__doc__ or "").split()[len(method.summary.split()) :])
    labels = {"": method.name, **{name: f"{method.name}@{name}" for name in method.presets}}
    facts = {
        "Keeps": method.summary,
        "Paper": f"<{method.paper}>" if method.paper.startswith("https://") else method.paper,
        "Authors' code": CODE.sub(r"[\1 at \2](https://github.com/\1/tree/\2)", method.code) or "none on record",
        "Source": said.get("Source", ""),
        "Differences": differences(method.policy.__module__) or "none known",
        "Observes": by_form({form: observed(make_policy(label).needs) for form, label in labels.items()}),
        "Bytes of a slot": by_form({form: slot_bytes(make_policy(label)) for form, label in labels.items()}),
    }
    listed = [f"- **{name}:** {text}" for name, text in facts.items() if text]
    lines = [f"\n## {method.name}\n", said.get("", ""), "", *listed, "", *_presets(method)]
    return "\n".join([*lines, *(["", f"Parameters: {described}"] if described else [])])


def paragraphs(docstring: str) -> dict[str, str]:
    """Return the text of a module's docstring by label, `Source` or `Differences`; what has none is under ""."""
    found: dict[str, list[str]] = {}
    for block in docstring.split("\n\n"):
        before, *labelled = LABEL.split(" ".join(block.split()))
        for label, text in (("", before), *zip(labelled[::2], labelled[1::2], strict=True)):
            name = label and ("Source" if label == "Source" else "Differences")
            found.setdefault(name, []).append(text.strip())
    return {name: " ".join(filter(None, texts)) for name, texts in found.items()}


def differences(module: str) -> str:
    """Return what a method's module says of its differences; for one in a package, what all modules of it say."""
    own = paragraphs(import_module(module).__doc__ or "").get("Differences", "")
    package = module.rpartition(".")[0]
    if package == "methods":
        return own
    siblings = [f"{package}.{found.name}" for found in pkgutil.iter_modules(import_module(package).__path__)]
    theirs = {name: paragraphs(import_module(name).__doc__ or "").get("Differences") for name in siblings}
    told = [f"In `{name}`: {text}" for name, text in theirs.items() if text and name != module]
    return " ".join([own, *told]).strip()


def observed(needs: Needs) -> str:
    """Return what `needs` asks to be observed, in words."""
    asked = {field.name: getattr(needs, field.name) for field in fields(needs)}
    return ", ".join(OBSERVED[name](value) for name, value in asked.items() if value) or "nothing"


def by_form(texts: Mapping[str, str]) -> str:
    """List what is said of the default, "", and of the presets that differ from it. Like ones are named together."""
    alike: dict[str, list[str]] = {}
    for form, text in texts.items():
        alike.setdefault(text, []).append(f"`@{form}`")
    others = [f"{', '.join(forms)}: {text}" for text, forms in alike.items() if text != texts[""]]
    return "\n  - ".join([texts[""], *others])


def slot_bytes(policy: KVPolicy) -> str:
    """Return the bytes of a live slot, measured on random prompts: a formula, or where none holds, the mean."""
    try:
        kvs = _compressed(policy, BUDGETS[-1])
    except PolicyError:  # it runs a model, and here is none
        return "as many as without the preset"
    side = _side(kvs[0])
    sizes = {unit: sum(size for size, own in side.values() if own == unit) for unit in ("a slot", "a head")}
    counted = (_live(kvs) * (kvs[0].slot_bytes + sizes["a slot"])) + _heads(kvs) * sizes["a head"]
    if counted == sum(kv.nbytes for kv in kvs):
        return PLAIN + "".join(f" + {size:g} {unit} (`{name}`)" for name, (size, unit) in side.items())
    return "; ".join([*_codes(kvs[0]), f"on average {', '.join(_means(policy))}"])


def _codes(kv: KV) -> Iterator[str]:
    """What a slot of codes takes, and which slots are none."""
    if not isinstance(kv, CodedKV):
        return
    codes = kv.parts[0][1]
    if isinstance(codes, SlotCodes):
        yield f"{codes.coding.slot_bytes(DIM, DIM)} of codes + {POSITION_BYTES}"
    elif isinstance(codes, MinMaxCodes):
        numbers = codes.keys.shape[-1] + codes.values.shape[-1]
        scales = codes.nbytes / (codes.keys.shape[0] * codes.slots) - numbers
        yield (
            f"2 x D x {codes.coding.bits} / 8 = {numbers} of codes + {scales:.1f} of scales and zeros + "
            f"{POSITION_BYTES}"
        )
    yield f"the last {codes.coding.residual} of a head are plain"


def _compressed(policy: KVPolicy, budget: int) -> list[KV]:
    """What is left at a budget; of a prompt of so many tokens, where the policy has none."""
    tokens = budget if policy.kind == "whole" else PROMPT
    return policy.compress(make_view(tokens, policy.needs, dim=DIM, dtype=DTYPE), budget)


def _side(kv: KV) -> dict[str, tuple[float, str]]:
    """Bytes of each tensor of side data, and what they are counted by."""
    slots, heads = kv.positions.numel(), kv.positions.shape[0] * kv.positions.shape[1]
    whole = {name: x.shape[:3] == kv.positions.shape for name, x in kv.extra.items()}
    return {n: (x.nbytes / slots, "a slot") if whole[n] else (x.nbytes / heads, "a head") for n, x in kv.extra.items()}


def _means(policy: KVPolicy) -> Iterator[str]:
    """The mean bytes of a live slot at each budget that it serves."""
    for budget in BUDGETS:
        try:
            kvs = _compressed(policy, budget)
        except BudgetTooSmall:
            continue
        slots = f"budget {budget} ({_live(kvs) / _heads(kvs):.0f} slots)" if policy.budgeted else f"{budget} tokens"
        yield f"{sum(kv.nbytes for kv in kvs) / _live(kvs):.1f} at {slots}"


def _live(kvs: Sequence[KV]) -> int:
    return sum(int(kv.live.sum()) for kv in kvs)


def _heads(kvs: Sequence[KV]) -> int:
    return sum(kv.live.numel() for kv in kvs)


def _presets(method: Method) -> list[str]:
    """Parameters by preset, with the values that `harness tune` tries."""
    if not method.parameters:
        names = ", ".join(f"`@{name}`" for name in method.presets)
        return [f"No parameters{f'; {names} is the same' if names else ''}."]
    default = method.policy()
    tuned = {f"@tuned, {path.parent.name}": load_tuning(path)[0].chosen for path in packaged(method.name)}
    forms = {**{f"@{name}": values for name, values in method.presets.items()}, **tuned}
    head, rows = ["parameter", "default", *(f"`{name}`" for name in forms)], []
    for name in method.parameters:
        own = getattr(default, name)
        given = (values.get(name, own) for values in forms.values())
        rows.append([f"`{name}`", _value(own), *("" if value == own else _value(value) for value in given)])
    if method.choices:
        head.append("`harness tune` tries")
        rows = [[*row, ", ".join(map(_value, method.choices.get(row[0].strip("`"), ())))] for row in rows]
    return _table(head, rows)


def _value(value: Any) -> str:
    return f"`{value}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
