"""Options, of a command line or a TOML file, to a sweep."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pydantic import ValidationError

from harness.errors import HarnessError, one_line
from harness.records.spec import Sweep


def sweep_of(args: argparse.Namespace, options: dict[str, Any]) -> Sweep:
    """Options of the TOML file, overridden by those of the command line. Raises HarnessError for unusable ones."""
    typed = {name: getattr(args, name) for name in Sweep.model_fields if getattr(args, name, None) is not None}
    if args.set:
        given = options.get("set", {})
        typed["set"] = {**given, **dict(map(assignment, args.set))} if isinstance(given, dict) else given
    options.update(typed)
    for name, example in (("methods", "compilerkv,snapkv"), ("tasks", "niah,stdlib")):
        if not options.get(name):
            raise HarnessError(f"no {name} asked for; add --{name} {example} or --config quick")
    try:
        sweep = Sweep.model_validate(options)
    except ValidationError as error:
        raise one_line(error) from None
    smallest = {"limit": sweep.limit, "max_tokens": sweep.max_tokens, "max_new_tokens": sweep.max_new_tokens}
    smallest |= {"lengths": min(sweep.lengths, default=0), "threads": args.threads}
    for name, value in smallest.items():
        if value is not None and value < 1:
            raise HarnessError(f"--{name.replace('_', '-')} {value} is too small; give at least 1")
    if sweep.nll_tokens < 0:
        raise HarnessError(f"--nll-tokens {sweep.nll_tokens} is negative; give 0 to turn it off")
    return sweep


def assignment(text: str) -> tuple[str, Any]:
    """A `--set` option as parameter and value: JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise HarnessError(f"--set {text!r} has no value; write method.parameter=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
