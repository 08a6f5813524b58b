"""The command line in this process, a small sweep of the tiny model through it, and how its folder is read."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.cli import main

METHODS = ("fullkv", "snapkv@kvcf", "streamingllm@paper")
TASK = ("--tasks", "stdlib/next_line", "--lengths", "512", "--limit", "3", "--max-new-tokens", "6")
TINY = ("--model", "tiny", "--dtype", "float32", "--device", "cpu")
PLAIN = ("--contexts", "protocol", "--nll-tokens", "8", "--observe", "0")  # planned faster; no board has a time in it
FAST = (*TINY, *PLAIN, "--budgets", "32,0.25", *TASK)
RUN = ("run", *FAST, "--methods", ",".join(METHODS))
CELLS = 5  # of each of 3 samples: fullkv once, two methods at two budgets
TIMES = {"prefill_s", "observe_ms", "compress_s", "decode_s", "decode_rows"}


def call(*arguments: str | Path) -> int:
    """The exit code of a command, run in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def verb(parser_of: Callable[[argparse.ArgumentParser], None], *words: object) -> int:
    """The exit code of one command alone, given its parser. Raises what it raises."""
    parser = argparse.ArgumentParser()
    parser_of(parser)
    args = parser.parse_args([str(word) for word in words])
    return int(args.action(args, ("harness",)))


def only(root: Path) -> Path:
    """The one folder below `root`."""
    (folder,) = [path for path in root.iterdir() if path.is_dir()]
    return folder


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` by its name there."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def manifest(root: Path) -> Any:
    """The run.json of the one run below `root`."""
    return json.loads((only(root) / "run.json").read_text())


def records(root: Path) -> list[dict[str, Any]]:
    """Every stored line, without how long it took and in what company; likelihoods to three digits."""
    lines = (only(root) / "records.jsonl").read_text().splitlines()
    kept = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    return [{key: round(value, 3) if key.startswith("nll") else value for key, value in r.items()} for r in kept]


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """What a stored line is found by."""
    return tuple(record[name] for name in ("task", "sample_id", "method", "budget"))
