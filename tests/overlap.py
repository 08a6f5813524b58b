"""How much text do any two prompts of a board have in common? `make overlap` prints it for every board file.

Of two prompts: the runs of eight words that both have, over the runs of the one that has fewer. Words are those with a
letter or digit, so that the dots between RULER's coded words are none. What a task gives to each prompt by its protocol
is left out, which is its question, its answer prefix and its needles; what it says before the text counts. Prompts of
one `meta.group` are one context and are not compared.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from harness.boards.sources import BOARDS, read_config
from harness.plan.datasets import find_asset
from tasks import load_tasks
from tasks.base import Contexts, Sample, TaskOptions, find_tasks
from tests.measured import keep
from tests.task_data import Words

RUN = 8
CONTEXTS = 20
"""Contexts of a task that ranks ask for; a board file that has fewer is looked at with as many."""


class Prompt(NamedTuple):
    """A prompt's name, its context's, and its runs of words."""

    name: str
    group: str
    runs: frozenset[int]


class Overlap(NamedTuple):
    """What two prompts share, of 1."""

    share: float
    first: str
    second: str


def prompt(task: str, sample: Sample) -> Prompt:
    """Return the runs of a sample's context, hashed, without those of its question, answer prefix and needles."""
    text = sample.context
    for needle in sorted(sample.meta.get("needles", ()), key=len, reverse=True):
        text = text.replace(needle, "\0")
    own = {run for part in text.split("\0") for run in _runs(part)} - set(_runs(sample.question + sample.answer_prefix))
    return Prompt(f"{task} {sample.id}", f"{task} {sample.meta['group']}", frozenset(own))


def overlaps(prompts: Sequence[Prompt]) -> list[Overlap]:
    """Return what any two prompts of different groups share, most first, without those that share nothing."""
    having = defaultdict(list)
    for number, one in enumerate(prompts):
        for run in one.runs:
            having[run].append(number)
    shared = Counter(pair for numbers in having.values() for pair in combinations(numbers, 2))
    apart = (((prompts[i], prompts[j]), n) for (i, j), n in shared.items() if prompts[i].group != prompts[j].group)
    found = (Overlap(n / min(len(a.runs), len(b.runs)), a.name, b.name) for (a, b), n in apart)
    return sorted(found, reverse=True)


def board_prompts(board: str, contexts: Contexts) -> Iterator[Prompt]:
    """Yield the prompts of a board file's generated tasks, `CONTEXTS` a task at least; a token is a word."""
    asked = read_config(board)
    lengths = tuple(asked.get("lengths", (1024,)))
    options = TaskOptions(
        tokenizer=Words(),
        max_tokens=2 * max(lengths),
        lengths=lengths,
        limit=max(asked["limit"], -(-CONTEXTS // len(lengths))),
        seed=asked.get("seed", 42),
        contexts=contexts,
        fetch=find_asset,
    )
    load_tasks()
    for task in find_tasks(asked["tasks"]):
        yield from (prompt(task.name, sample) for sample in task.samples(options))


def boards() -> list[str]:
    """Return the boards whose tasks need no files of their own."""
    named = (path.stem for path in sorted(BOARDS.glob("*.toml")))
    return [name for name in named if not any(task.startswith("longbench") for task in read_config(name)["tasks"])]


def _runs(text: str) -> Iterator[int]:
    words = [word for word in text.split() if re.search(r"\w", word)]
    return (hash(tuple(words[at : at + RUN])) for at in range(len(words) - RUN + 1))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="file of `tests/measured.py` to keep the largest overlaps in")
    asked = parser.parse_args()
    print("| board | contexts | prompts | groups | largest overlap | of |\n| --- | --- | --- | --- | --- | --- |")
    for board in boards():
        for contexts in ("protocol", "drawn"):
            prompts = [*board_prompts(board, contexts)]
            most = next(iter(overlaps(prompts)), Overlap(0.0, "", ""))
            groups = len({one.group for one in prompts})
            of = f"{most.first}, {most.second}"
            print(f"| `{board}` | {contexts} | {len(prompts)} | {groups} | {most.share:.3f} | {of} |", flush=True)
            if asked.keep is not None:
                keep(asked.keep, "make overlap", {f"{board}, {contexts}": {"share": most.share, "of": of}})


if __name__ == "__main__":
    _main()
