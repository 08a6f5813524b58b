"""Verdicts as a table for the terminal, as JSON, and as the page docs/claims.md."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

import pandas as pd

from harness.claims.claim import Bounded, Elsewhere, Records
from harness.claims.verdict import Verdict, Word
from leaderboards.text import Section, clean, escape, interval, terminal

WORDS: tuple[Word, ...] = ("holds", "does not hold", "cannot be told", "cannot be checked here")
HEAD = """# Published claims

[README](../README.md) · [CompilerKV](compilerkv.md) · [Methods](methods.md) · [Statistics](statistics.md)

Written by `make docs` from the data of `harness/claims/data`; change that. `harness claims` computes every verdict
anew, `harness claims ID` says more of one claim, `--paper snapkv` shows those of a method or paper.

- **holds**, **does not hold**: the number, or its whole 95 % interval, lies within the bounds that the check asks for,
  or outside. **Cannot be told**: the interval reaches a bound, or a task has fewer than 20 contexts
  ([why](statistics.md#ranks)). **Cannot be checked here**: there is nothing to compute it from; the command is what
  would check it.
- *arithmetic* follows from shapes and bits. *property* is what our code does on a prompt that is made up for it.
  *records* is a paired difference of published records, a mean of task means over tasks that could rank.
  Intervals are of one comparison each, not corrected for their number.
- A verdict from records says what is found with SmolLM2-135M-Instruct on these prompts, which are not the paper's. It
  says nothing of models of 8B.
"""


def to_terminal(verdicts: Sequence[Verdict], *, whole: bool) -> str:
    """A table of at most 120 columns, and how many there are of each verdict. whole: everything of each claim below."""
    rows = [(v.claim.id, v.word, asked(v), measured(v)) for v in verdicts]
    table = pd.DataFrame(rows, columns=["claim", "verdict", "asked", "found"])
    parts = [Section("", table), Section("", counted(verdicts))]
    return terminal([*parts, *(Section(v.claim.id, _lines(v)) for v in verdicts if whole)])


def to_json(verdicts: Iterable[Verdict]) -> str:
    """A list with an entry a claim: its data, its verdict, and what was found; null where there is no number."""
    return json.dumps([_entry(v) for v in verdicts], indent=1, ensure_ascii=False)


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """The page, without a line break at its end."""
    parts = [HEAD, counted(verdicts)]
    for section, own in groupby(verdicts, key=lambda v: v.claim.section):
        parts.append(f"\n## {section}\n\n| claim | says | asked | found | verdict | checked by |\n|{' --- |' * 6}")
        parts += [f"| {' | '.join(_cells(v))} |" for v in own]
    return "\n".join(parts)


def counted(verdicts: Sequence[Verdict]) -> str:
    """How many there are of each verdict."""
    found = Counter(v.word for v in verdicts)
    return f"{len(verdicts)} claims: " + ", ".join(f"{found[word]} {word}" for word in WORDS if found[word]) + "."


def asked(verdict: Verdict) -> str:
    """The bounds of a check."""
    check = verdict.claim.check
    if not isinstance(check, Bounded):
        return "-"
    if check.at_least == check.at_most:
        return f"{check.at_least:g}"
    ends = (f">= {check.at_least:g}", f"<= {check.at_most:g}")
    told = [end for end, bound in zip(ends, (check.at_least, check.at_most), strict=True) if math.isfinite(bound)]
    return f"{' and '.join(told)} {check.unit}".strip()


def measured(verdict: Verdict) -> str:
    """What was found, with its interval where it has one."""
    check, found = verdict.claim.check, verdict.found
    if math.isnan(found.value):
        return "-"
    if isinstance(check, Records):
        digits = 1 if check.measure == "score" else 2
        return f"{interval(found.value, found.low, found.high, digits=digits, sign='+')}, n {found.n}"
    if found.low < found.high:
        return interval(found.value, found.low, found.high, digits=2)
    return f"{found.value:.3g}"


def _cells(verdict: Verdict) -> tuple[str, ...]:
    claim = verdict.claim
    number = claim.paper.rpartition("/")[2]
    says = f"{claim.says} ([{number}]({claim.paper}), {claim.where})"
    number_found = "" if math.isnan(verdict.found.value) else measured(verdict)
    told = "; ".join(filter(None, (number_found, claim.note, verdict.found.why)))
    return (f"`{claim.id}`", says, escape(asked(verdict)), told, verdict.word, f"`{claim.checked_by}`")


def _lines(verdict: Verdict) -> list[str]:
    claim, check = verdict.claim, verdict.claim.check
    facts = {
        "says": f"{claim.says} ({', '.join(f'{x:g}' for x in claim.published)})",
        "paper": f"{claim.paper}, {claim.where}",
        "read at": claim.source,
        "its protocol": f"{claim.model}; {claim.protocol}",
        "our method": claim.preset,
        "kind": check.kind if not isinstance(check, Elsewhere) else "",
        "why": verdict.found.why,
        "note": claim.note,
        "check": claim.checked_by,
    }
    return [f"{name}: {clean(text, longest=1000)}" for name, text in facts.items() if text]


def _entry(verdict: Verdict) -> dict[str, object]:
    found = {name: getattr(verdict.found, name) for name in ("value", "low", "high")}
    known = {name: value if math.isfinite(value) else None for name, value in found.items()}
    claim = verdict.claim.model_dump(mode="json", exclude_defaults=True)
    return {
        **claim,
        "command": verdict.claim.checked_by,
        "verdict": verdict.word,
        "found": {**known, "n": verdict.found.n, "why": verdict.found.why},
    }
