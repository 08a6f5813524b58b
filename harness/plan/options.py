"""Options, of a command line or a TOML file, to a sweep."""

import argparse
import json
from typing import Any

from harness.errors import HarnessError, checked
from harness.records.spec import Sweep


def sweep_of(args: argparse.Namespace, options: dict[str, Any]) -> Sweep:
    """The sweep that options of a TOML file ask for, overridden by those of the command line.

    Raises HarnessError for an option that is unknown, of another type or out of range.
    """
    if args.threads is not None and args.threads < 1:
        raise HarnessError(f"--threads {args.threads} is too small; give at least 1")
    typed = {name: getattr(args, name) for name in Sweep.model_fields if getattr(args, name, None) is not None}
    if args.set:
        given = options.get("set", {})
        typed["set"] = {**given, **dict(map(assignment, args.set))} if isinstance(given, dict) else given
    return checked(Sweep, {"methods": (), "tasks": (), **options, **typed})


def assignment(text: str) -> tuple[str, Any]:
    """A `--set` option as parameter and value: JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise HarnessError(f"--set {text!r} has no value; write method.parameter=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
