"""What a submitted manifest is checked for: it says what was run, in names and numbers that exist here.

A method is one of the registry under its own label. What its label spells, and how many bits its codes have, is what
the label makes here; other parameters are as reported, for defaults change: `--rescore` runs the method with them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

import harness.kvpress  # noqa: F401 - `kvpress:` labels
from harness.errors import shown
from harness.records.record import READ, CellKey, RunManifest
from harness.records.spec import AS, FULL, OWN, MethodSpec
from harness.submission.archive import CELLS_AT_MOST, RECORDS_AT_MOST
from methods.budget import Budget, PolicyError
from methods.label import MethodLabel
from methods.registry import check_method, load_methods, make_policy
from tasks import load_tasks


def manifest_problems(manifest: RunManifest, *, partial: bool) -> Iterator[str]:
    """Say what is wrong with a manifest; nothing further is looked at where there is anything."""
    spec = manifest.spec
    parts = {"tasks": spec.tasks, "methods": spec.methods, "lengths": spec.lengths, "samples": manifest.samples}
    if empty := [name for name, part in parts.items() if not part]:
        yield f"an empty run: no {', no '.join(empty)}"
        return
    if manifest.status != "finished" and not partial:
        yield f"the run is {manifest.status}, not finished; pass --partial for a part of one"
    yield from _task_problems(manifest)
    if len(spec.methods) * len(spec.budgets) > CELLS_AT_MOST:
        yield f"{len(spec.methods)} methods at {len(spec.budgets)} budgets, at most {CELLS_AT_MOST:,} cells are read"
        return
    for method in spec.methods:
        yield from _method_problems(method)
    yield from _cell_problems(manifest)


def _task_problems(manifest: RunManifest) -> Iterator[str]:
    known = load_tasks()
    for name, count in Counter(task.name for task in manifest.spec.tasks).items():
        if count > 1:
            yield f"task {shown(name)} is there {count} times"
        if name not in known:
            yield f"scores of task {shown(name)} cannot be recomputed: this version does not know it"
    for task in manifest.spec.tasks:
        if task.name in known and task.protocol != known[task.name].protocol:
            yield f"{task.name} has protocol {shown(task.protocol)}, here {known[task.name].protocol}"


def _method_problems(method: MethodSpec) -> Iterator[str]:
    """A label is ASCII: letters of another alphabet look the same and are another method."""
    if not method.label.isascii():
        yield f"label {shown(ascii(method.label))} is not in ASCII"
        return
    try:
        label = MethodLabel.parse(method.label)
        spelled = {key: _value(text) for key, text in label.params}
        check_method(MethodLabel.parse(label.asked), spelled)
    except PolicyError as error:
        yield f"method {shown(method.label)} is not known here: {error}; verify it where it is installed"
        return
    if method.name != label.name:
        yield f"label {shown(method.label)} goes with {label.name}, not with {shown(method.name)}"
    elif label.prefix is None:
        yield from _param_problems(method, label, spelled)


def _param_problems(method: MethodSpec, label: MethodLabel, spelled: Mapping[str, Any]) -> Iterator[str]:
    known = _registry()[label.name]
    defaults = {field.name: field.default for field in fields(known.policy) if field.init}  # type: ignore[arg-type]
    wanted = {**defaults, **known.presets.get(label.preset, {}), **spelled}
    kind = "budgeted" if method.budgeted else "own" if method.own else "whole"
    try:
        if kind != (found := make_policy(label.asked, spelled).kind):
            yield f"method {label} is said to be of the kind {kind}, here it is {found}"
    except PolicyError as error:
        yield f"method {shown(method.label)} cannot be made here: {error}; verify it where it can"
    for name, value in method.params.items():
        fixed = name in spelled or name == "bits"
        if fixed and value != wanted.get(name, MISSING):
            here = shown(wanted[name]) if name in wanted else "no such parameter"
            yield f"method {label} has {name}={shown(value)}, its label makes {here}"


_registry = cache(load_methods)  # it looks for plugins each time


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _cell_problems(manifest: RunManifest) -> Iterator[str]:
    labels = [method.label for method in manifest.spec.methods]
    if len(set(labels)) < len(labels):
        yield f"a method is there twice: {shown(Counter(labels).most_common(1)[0][0])}"
    try:
        cells = cells_of(manifest)
    except PolicyError as error:
        yield str(error)
        return
    count, own = len(cells), {method.label for method in manifest.spec.methods if method.own}
    for text in manifest.spec.budgets:
        if text.startswith(AS) and text.removeprefix(AS) not in own:
            yield f"budget {shown(text)} is what no method of this run keeps"
        elif not text.startswith(AS) and str(Budget.parse(text)) != text:
            yield f"budget {shown(text)} is written {Budget.parse(text)} here"
    if manifest.cells != count:
        yield f"it says {manifest.cells} cells a sample, methods and budgets make {count}"
    if manifest.samples * count > RECORDS_AT_MOST:
        yield f"{manifest.samples} samples of {count} cells, at most {RECORDS_AT_MOST:,} records are read"


CellBudget = Budget | str | None
"""Of a cell: a number; the label of the method whose own it is given; None for a method that is given none."""


def cells_of(manifest: RunManifest) -> dict[CellKey, CellBudget]:
    """Read the budget of every cell of the spec. Raises PolicyError for one that is none."""
    budgets: dict[str, CellBudget] = {}
    for text in manifest.spec.budgets:
        own = text.removeprefix(AS) if text.startswith(AS) else Budget.parse(text)
        budgets[text if isinstance(own, str) else str(own)] = own
    none: dict[bool, dict[str, CellBudget]] = {False: {FULL: None}, True: {OWN: None}}
    choosing = choosing_of(manifest)
    return {
        (method.label, READ + text if budget and method.label in choosing else text): budget
        for method in manifest.spec.methods
        for text, budget in (budgets if method.budgeted else none[method.own]).items()
    }


def choosing_of(manifest: RunManifest) -> frozenset[str]:
    """Labels of the methods that choose for each decoded token what it reads of their cache."""
    known = _registry()
    named = ((method.label, known.get(method.name)) for method in manifest.spec.methods)
    return frozenset(label for label, entry in named if entry is not None and entry.policy.reads_a_part)


def least_of(manifest: RunManifest) -> dict[str, float]:
    """The least part of a plain slot that one of each method takes; nothing of those that cannot be made here."""
    plain, found = {"float32": 32}.get(manifest.spec.model.dtype, 16), dict[str, float]()
    for spec in manifest.spec.methods:
        try:
            label = MethodLabel.parse(spec.label)
            policy = make_policy(label.asked, {key: _value(text) for key, text in label.params})
        except PolicyError:
            continue  # `manifest_problems` tells
        found[spec.label] = policy.least_share(plain)
    return found
