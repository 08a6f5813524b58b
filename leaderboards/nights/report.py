"""Which published night tonight is judged by, and the report on it.

The newest night of the same board, version, machine class and settings decides. Where there is none, a new processor, a
new dtype or another torch, tonight begins a new series and says so. The newest of each other machine class is compared
too, for information: other kernels give other scores, and nobody's change did that. But no kernel takes a task to 0:
what fell to 0 since the last night of another class fails a new series too. Seconds of another machine are never
compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import pandas as pd

from leaderboards.nights.compare import NightComparison, NightlyOptions, compare
from leaderboards.nights.files import Night
from leaderboards.stats.paired import Change
from leaderboards.text import TERMINAL_WIDTH, Section, clean, interval, keys, markdown, number, terminal

SHOWN = {"score": ("score", 1), "nll": ("NLL", 3)}
"""Measure to its name and its decimals."""


@dataclass(frozen=True)
class NightVerdict:
    """What is known of a night. others: of other machine classes; aside: why stored nights were not compared with."""

    night: Night
    options: NightlyOptions
    baseline: Night | None
    comparison: NightComparison | None
    others: tuple[tuple[Night, NightComparison], ...]
    aside: tuple[str, ...]
    accepted: bool = False

    @property
    def new_series(self) -> bool:
        """Whether tonight was compared with no night, or with one of which no prompt, method or budget is left."""
        return self.comparison is None or not self.comparison.cells

    @property
    def fallen(self) -> tuple[str, ...]:
        """Of a new series, the cells that fell to 0 since the last night of another machine class."""
        if self.comparison is not None or not self.others:
            return ()
        return max(self.others, key=lambda other: other[0].about.finished)[1].fallen

    @property
    def regressions(self) -> int:
        return len(self.fallen) if self.comparison is None else self.comparison.regressions

    @property
    def publishable(self) -> bool:
        """Whether this night becomes what the next one is compared with."""
        return self.accepted or not self.regressions


def judge(night: Night, stored: Sequence[Night], options: NightlyOptions, *, accept: bool = False) -> NightVerdict:
    """Tonight against the nights of its board that are kept, the newest first (`nights.read_nights`)."""
    newest, aside = dict[str, Night](), []
    for old in stored:
        if why := _unlike(old, night):
            aside.append(f"{old.about.name} of {old.about.finished}: {why}")
        else:
            newest.setdefault(old.about.machine_class, old)
    baseline = newest.pop(night.about.machine_class, None)
    comparison = None if baseline is None else compare(baseline, night, options)
    others = tuple((old, compare(old, night, options)) for _, old in sorted(newest.items()))
    return NightVerdict(night, options, baseline, comparison, others, tuple(aside), accept)


def _unlike(old: Night, night: Night) -> str:
    """Why the two share no comparison, if so."""
    if old.about.version != night.about.version:
        return f"version {old.about.version} is retired, this is {night.about.version}"
    theirs, ours = old.about.settings, night.about.settings
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return "; ".join(f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in names)


def headline(verdict: NightVerdict) -> str:
    """What came out, in one line."""
    many = verdict.regressions
    told = f"{many} regression{'s' if many > 1 else ''}" + (", accepted" if verdict.accepted else "") if many else ""
    if verdict.new_series:
        return f"new series, {told}" if told else "new series: compared with no night, this one becomes its baseline"
    return told or "no regression"


def warning(verdict: NightVerdict) -> str:
    """Why tonight begins a new series, in one line; empty where it does not."""
    if not verdict.new_series:
        return ""
    last = max((old for old, _ in verdict.others), key=lambda old: old.about.finished, default=None)
    here = verdict.night.about.machine_class
    if verdict.baseline is not None:
        why = f"the last night of {here} has no prompt, method or budget in common with this one"
    elif last is not None:
        why = f"the last night was on {last.about.machine_class}, this is {here}"
    else:
        why = verdict.aside[0] if verdict.aside else f"no night of this board is stored, this is {here}"
    return clean(f"new series: {why}; no regression can be seen until the next night", longest=1000)


def to_markdown(verdict: NightVerdict) -> str:
    """The report as a page."""
    return markdown(_sections(verdict, level=1))


def to_terminal(verdict: NightVerdict, *, width: int = TERMINAL_WIDTH) -> str:
    """The report as text of at most `width` columns."""
    return terminal(_sections(verdict), width=width)


def _facts(verdict: NightVerdict) -> list[str]:
    about, compared, options = verdict.night.about, verdict.comparison, verdict.options
    begun, ended = (datetime.fromisoformat(when) for when in (about.started, about.finished))
    seconds = max(0, round((ended - begun).total_seconds()))  # a clock may have been set back
    lines = [
        f"tonight: {_told(verdict.night)}, {seconds // 60} min {seconds % 60} s; {about.samples} samples, "
        f"{len(verdict.night.table)} records",
        f"machine class: {about.machine_class}; version {about.version}",
        *([warning(verdict)] if verdict.new_series else ()),
        f"baseline: {'none' if verdict.baseline is None else _told(verdict.baseline)}",
    ]
    if compared is not None:
        moved = sum(change.moved > 0 for change in compared.changes)
        lines += [
            f"compared: {compared.cells} cells (method, budget, task) by score and NLL, with means over tasks and over "
            f"cells {len(compared.changes)} comparisons; {moved} differ at all, {compared.counted} counted in the "
            "correction",
            f"a regression: corrected one-sided p <= {options.alpha:g} and worse by more than {options.score_points:g} "
            f"points or {options.nll_nats:g} nats per token; a cell that fell to 0; a lost score; bytes grown by more "
            f"than {options.bytes_percent:g} %",
        ]
    return [clean(line, longest=1000) for line in lines]


def _told(night: Night) -> str:
    about = night.about
    return f"{about.finished}, run {about.run_id}, commit {(about.commit or 'unknown')[:12]}"


def _sections(verdict: NightVerdict, *, level: int = 2) -> list[Section]:
    """The sections of the report that have something to say. level: of the title."""
    compared, bodies = verdict.comparison, dict[str, pd.DataFrame | Sequence[str]]()
    if compared is not None:
        bodies["Regressed"] = _changes(compared.regressed, worse=True)
        bodies["Regressed, without a test"] = compared.facts
        bodies["Improved"] = _changes(compared.improved, worse=False)
        bodies["Not compared"] = compared.retired
    bodies["Fell to 0 since the last night of another machine class"] = verdict.fallen
    bodies["Seconds"] = _seconds(verdict)
    bodies["Other machine classes, for information"] = [_other(*other) for other in verdict.others]
    bodies["Set aside"] = verdict.aside
    if compared is not None and (compared.regressed or compared.improved):
        bodies["How to read"] = HOW_TO_READ
    title = Section(clean(f"{verdict.night.about.board}: {headline(verdict)}"), _facts(verdict), level=level)
    lines = {name: body if isinstance(body, pd.DataFrame) else [*map(clean, body)] for name, body in bodies.items()}
    return [title, *(Section(name, body) for name, body in lines.items() if len(body))]


HOW_TO_READ = (
    "before, now: mean of task means on the same prompts; change: with its 95 % paired bootstrap interval. Score "
    "0-100, NLL in nats per token (lower is better). all methods: mean over all methods and budgets of each prompt.",
    "p: one-sided sign-flip test of the paired differences; corrected by Holm over all comparisons of the night that "
    "could be significant (Tarone).",
)


def _changes(changes: Sequence[Change], *, worse: bool) -> pd.DataFrame:
    rows = []
    for c in changes:
        measure, digits = SHOWN[c.measure]
        p, corrected = (c.worse, c.corrected_worse) if worse else (c.better, c.corrected_better)
        rows.append(
            {
                **keys(vars(c)),
                "task": clean(c.task),
                "measure": measure,
                "before": number(c.before, digits=digits),
                "now": number(c.now, digits=digits),
                "change": interval(*c.change[:3], digits=digits, sign="+"),
                "p": f"{p:.2g}",
                "corrected p": f"{corrected:.2g}",
                "n": str(c.change.n),
            }
        )
    return pd.DataFrame(rows)


def _seconds(verdict: NightVerdict) -> list[str]:
    """Tonight's, beside those of the baseline, which has the same kind of machine."""
    lines = []
    for phase, seconds in verdict.night.about.seconds:
        line = f"{phase}: {seconds:.4g} s a sample"
        if verdict.baseline is not None:
            old = float(getattr(verdict.baseline.about.seconds, phase))
            line += f", before {old:.4g} s" + (f" ({100 * (seconds / old - 1):+.1f} %)" if old else "")
        lines.append(line)
    if verdict.baseline is not None:
        same = verdict.night.about.machine_id == verdict.baseline.about.machine_id != ""
        alike = len(verdict.night.table) == len(verdict.baseline.table)
        judged = same and alike and verdict.options.speed_percent is not None
        floor = f"judged above {verdict.options.speed_percent:g} %" if judged else "not judged"
        cells = "" if alike else ", with another number of records"
        lines.append(f"{'the same machine' if same else 'another machine of the class, or several'}{cells}; {floor}")
    return lines


def _other(night: Night, compared: NightComparison) -> str:
    counts = f"{len(compared.changes)} comparisons {len(compared.regressed)} worse and {len(compared.improved)} better"
    zero = f"; {len(compared.fallen)} cells fell to 0" if compared.fallen else ""
    return f"{night.about.machine_class} ({_told(night)}): of {counts} beyond floor and correction{zero}"
