"""What of a request can be refused before torch is imported: options, methods, tasks, model, dtype and device."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness.kvpress  # noqa: F401 - `kvpress:` labels
from harness.errors import HarnessError, checked, shown
from harness.models.source import check_device, check_dtype, check_model, check_scored
from harness.plan.datasets import find_asset
from harness.records.spec import Asked, Sweep
from methods.budget import PolicyError
from methods.label import MethodLabel
from methods.registry import check_method, read_label
from tasks import load_tasks
from tasks.base import DataOptions, NothingFits, Task, TaskError, find_tasks
from tasks.graded.settings import named_calibration


@contextmanager
def refusals(what: str = "") -> Iterator[None]:
    """What a method or a task refuses, as an error for the user, after `what`."""
    try:
        yield
    except NothingFits:
        raise
    except (PolicyError, TaskError) as error:
        raise HarnessError(f"{what}{error}") from None


def sweep_of(args: argparse.Namespace, options: dict[str, Any]) -> Sweep:
    """The sweep that options of a TOML file ask for, overridden by those of the command line.

    Raises HarnessError for an option that is unknown, of another type or out of range.
    """
    typed = {name: getattr(args, name) for name in Sweep.model_fields if getattr(args, name, None) is not None}
    if args.set:
        given = options.get("set", {})
        typed["set"] = {**given, **dict(map(assignment, args.set))} if isinstance(given, dict) else given
    return checked(Sweep, {"methods": (), "tasks": (), **options, **typed})


def assignment(text: str) -> tuple[str, Any]:
    """A `--set` option as parameter and value: JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise HarnessError(f"--set {shown(text)} has no value; write method.parameter=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
    except RecursionError:
        raise HarnessError(f"--set {shown(text)} is nested too deep; give a simple value") from None


def check_sweep(sweep: Sweep) -> list[Task]:
    """The tasks of a sweep, once everything that it names is known and the tasks' data is there.

    Raises HarnessError, with the nearest known name, or the command that fetches the data.
    """
    check_asked(sweep)
    check_scored(sweep.model)
    tasks = plan_tasks(sweep)
    if sweep.receiver is not None:
        check_scored(sweep.receiver)
        if other := next((task.name for task in tasks if not task.relayed), None):
            raise HarnessError(f"--receiver answers relay tasks alone, {other} is none; leave one of the two out")
    places = DataOptions(data_dir=None if sweep.data_dir is None else Path(sweep.data_dir), fetch=find_asset)
    for task in tasks:
        with refusals(f"task {task.name}: "):
            task.find_data(places)
    for task in tasks:  # once all of them are there
        with refusals(f"task {task.name}: "):
            task.read_data(places)
    if sweep.graded is not None:
        with refusals():
            named_calibration(sweep.graded)
    return tasks


def check_asked(asked: Asked) -> None:
    """Raise HarnessError for the first thing that is named and is not there, as far as can be told without torch."""
    asked_methods(asked)
    check_model(asked.model)
    check_dtype(asked.dtype)
    check_device(asked.device)


def asked_methods(asked: Asked) -> list[tuple[MethodLabel, dict[str, Any]]]:
    """Every method asked for, once, with its changed parameters. Raises HarnessError for unknown names of any kind."""
    with refusals():
        labels = [read_label(text) for text in asked.methods]
        names = {label.name for label in labels}
        for key in asked.set:
            if "." not in key or key.partition(".")[0] not in names:
                raise HarnessError(f"--set {shown(key)} names no method of this run; write method.parameter=value")
        found = {label: label.own(asked.set) for label in labels}
        for label, changed in found.items():
            check_method(label, changed)
    return list(found.items())


def settled(sweep: Sweep) -> Sweep:
    """The sweep with the query mode that all of its tasks are made for, where none was asked for.

    Raises HarnessError for an unknown task, or an option that this mode excludes.
    """
    load_tasks()
    with refusals():
        modes = {task.query for task in find_tasks(sweep.tasks)}
    if "query" in sweep.model_fields_set or len(modes) > 1 or modes <= {None, sweep.query}:
        return sweep
    return checked(Sweep, {**sweep.model_dump(exclude_unset=True), "query": modes.pop()})


def plan_tasks(sweep: Sweep) -> list[Task]:
    """Tasks by name or family. Raises HarnessError, with the nearest known name, or for another way of asking."""
    query = settled(sweep).query
    with refusals():
        tasks = find_tasks(sweep.tasks)
    other = next((task for task in tasks if task.query not in (None, query)), None)
    if other is not None:
        raise HarnessError(f"task {other.name} is made for --query {other.query}, this run is {query}; change one")
    return tasks
