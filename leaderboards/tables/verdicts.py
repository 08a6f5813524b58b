"""What a table says in words: what ranks and what can be seen, and of each budget who may be first, at what cost.

The words follow the marks and the rank intervals of the table (`leaderboards.stats.aggregate`), so nobody is called
first or last whom the samples do not tell apart from every other method. No cell with `=` is surely better than another
one with it. A cell without a mark is surely worse than some method, so not first, but need not be told apart from each
of those that may be. Where a table ranks nothing, the highest mean is named as what it is. A cell that lacks samples is
named as that: its mean is over other samples than those beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.bootstrap import LEVEL
from leaderboards.stats.comparable import FULL, NOT_GIVEN, is_of_reading
from leaderboards.stats.processors import Elsewhere
from leaderboards.stats.stored import held_or_read, percent_column
from leaderboards.text import MIB, clean, half_width, interval, number

NAMED = 4
"""Methods that a sentence names; of more it gives their number."""
LINE = 400
"""Characters of a line."""


class MethodName(str):
    """A method's name within a sentence, cleaned; a page sets it in bold."""

    __slots__ = ()

    def __new__(cls, method: str) -> MethodName:
        return super().__new__(cls, clean(method))


Words = tuple[str, ...]
"""Parts of a sentence, of which some are a `MethodName`."""


class BudgetVerdict(NamedTuple):
    """What is known of one budget. won: whether one method is best. cost: bytes and time of those that may be first."""

    budget: str
    won: bool
    said: Words
    cost: str


def standing(table: Table) -> list[str]:
    """What ranks in the table: why nothing does, the tasks that are left out, and the least difference that is seen.

    And how far a row moves on another processor, where the board has one.
    """
    score, nll = (table.ranking.eligible[measure] for measure in ("score", "nll"))
    known = bool(nll.tasks or nll.left_out)
    if score.why and (nll.why or not known):
        both = f"by score {score.why}; by NLL {nll.why}" if known and not score.tasks else score.why
        lines = [f"ranks nothing: {clean(both, longest=LINE)}"]
    else:
        whys = {"score": score.why, "NLL": nll.why if known else ""}
        lines = [f"ranks nothing by {words}: {clean(why, longest=LINE)}" for words, why in whys.items() if why]
    for words, own in (("", score), (" by NLL", nll)):
        if own.left_out:
            left_out = ", ".join(f"{clean(task)} ({reason})" for task, reason in own.left_out)
            lines.append(f"left out of ranks{words}: {left_out}")
    if not score.checked:
        lines.append("left out of ranks: nothing, which could not be checked without fullkv")
    units = {"score": ("points", 1), "nll": ("nats per token", 3)}
    least = {units[m][0]: number(x, digits=units[m][1]) for m, x in table.ranking.least.items() if not math.isnan(x)}
    seen = " and ".join(f"{text} {unit}" for unit, text in least.items())
    lines += [f"differences under {seen} cannot be seen here"] if seen else []
    return [*lines, *map(_elsewhere, table.elsewhere)]


def _elsewhere(other: Elsewhere) -> str:
    """How far rows move on another processor."""
    parts = []
    for words, moved, digits in (("score", other.score, 1), ("NLL", other.nll, 3)):
        if moved is not None:
            most, here, there = (number(x, digits=digits) for x in (abs(moved.here - moved.there), *moved[2:4]))
            where = f"{clean(moved.method)} at {clean(moved.budget)}: {here} here, {there} there, n {moved.n}"
            parts.append(f"the mean {words} of a row moves by up to {most} ({where})")
    told = ", ".join(parts) or "no row has the same prompts"
    return f"the same sweep on {clean(other.processor)}, never mixed with this: {told}"


def verdicts(table: Table) -> list[BudgetVerdict]:
    """One for each budget of the table, in its order."""
    return [_verdict(budget, rows) for budget, rows in _by_budget(table).items()]


def uncompressed(table: Table) -> list[Words]:
    """A sentence for each scored method that is given no budget."""
    rows = [row for row in table.rows.to_dict("records") if row["budget"] in NOT_GIVEN and row["n_ok"]]
    return [(MethodName(row["method"]), f" {_not_given(row)}: {score_text(row)}{_on(row)}.") for row in rows]


def _not_given(row: TableRow) -> str:
    return "without compression" if row["budget"] == FULL else f"at its own budget ({_cost([row])})"


def tightest_and_widest(table: Table) -> list[str]:
    """What the table says of the budgets that keep the fewest and the most bytes, a line each, for a terminal.

    Differences to the uncompressed cache are the table's own paired ones, with their intervals.
    """
    held = [budget not in NOT_GIVEN and not is_of_reading(budget) for budget in table.rows["budget"]]
    limited = table.rows[held]
    kept = limited.groupby("budget", sort=False)[percent_column(limited)].mean().dropna()
    if not len(kept):
        return []
    ends = {kept.idxmin(), kept.idxmax()}
    lines = [_line(table, budget, rows) for budget, rows in _by_budget(table).items() if budget in ends]
    return ["".join(words) for words in uncompressed(table)] + lines


def score_text(row: TableRow) -> str:
    """The score of a row with half of its interval."""
    return half_width(*(row[f"score_points_{part}"] for part in ("mean", "low", "high")))


def nll_text(row: TableRow, most: int) -> str:
    """The NLL of a row, and over how many samples where that is fewer than `most`, though no score is lacking."""
    n = row["nll_nats_n"]
    return number(row["nll_nats_mean"], digits=3) + (f" ({n})" if 0 < n < most and not is_incomplete(row) else "")


def most_nll(rows: pd.DataFrame) -> dict[str, int]:
    """Budget to the most samples with an NLL that a row of it has."""
    return {str(budget): int(most) for budget, most in rows.groupby("budget")["nll_nats_n"].max().items()}


def _by_budget(table: Table) -> dict[str, Sequence[TableRow]]:
    groups = table.rows[~table.rows["budget"].isin(NOT_GIVEN)].groupby("budget", sort=False)
    return {str(budget): rows.to_dict("records") for budget, rows in groups}


def _verdict(budget: str, rows: Sequence[TableRow]) -> BudgetVerdict:
    scored, marked = _scored(rows), _marked(rows)
    lacking = [row for row in rows if row["n_ok"] and is_incomplete(row)]
    others = len(scored) - len(marked)
    won = bool(marked) and marked[0]["mark"] == "*"
    if lacking and not scored:
        said: Words = ("No ranking: no method is complete.",)
    elif len(scored) < 2:
        every = " on every sample" if lacking else ""
        said = (f"Nothing to compare: fewer than two methods have a score{every} within their bytes.",)
    elif all(math.isnan(row["rank_low"]) for row in rows):
        top = max(scored, key=lambda row: (row["score_points_mean"], row["method"]))
        said = (
            "Highest mean: ",
            MethodName(top["method"]),
            f" {score_text(top)}, of {len(scored)} methods; not ranked.",
        )
    elif not marked:
        said = ("No ranking: no method is complete.",)
    elif len(marked) > 1:
        said = _tied(marked, others)
    else:
        which, score = "the other method" if others == 1 else f"all {others} other methods", score_text(marked[0])
        best = f" is best, {score}, told apart from {which}."
        first = f" is first, {score}, but not told apart from every other method."
        said = (MethodName(marked[0]["method"]), best if won else first)
    fewer = [f" On {row['n_ok']} samples; other budgets have more." for row in scored if has_other_samples(row)][:1]
    return BudgetVerdict(
        budget, won, (*said, *_aside(lacking if scored else ()), *fewer), _cost(marked or scored or lacking)
    )


def _scored(rows: Sequence[TableRow]) -> list[TableRow]:
    """The rows whose means are over the same samples, within their bytes."""
    return [row for row in rows if row["n_ok"] and not row["n_over_budget"] and not is_incomplete(row)]


def is_incomplete(row: TableRow) -> bool:
    """Whether other rows of its budget have samples that this one lacks."""
    return "incomplete" in row["flags"].split()


def has_other_samples(row: TableRow) -> bool:
    """Whether some row of the table, at any budget, has samples that this one lacks."""
    return is_incomplete(row) or "other_samples" in row["flags"].split()


def _on(row: TableRow) -> str:
    """Over how many samples the mean of a row is that lacks some."""
    return f" (on {row['n_ok']} of {row['n_expected']} samples)" if is_incomplete(row) else ""


def _aside(rows: Sequence[TableRow]) -> Words:
    """Who is not compared, since it lacks samples, and how many it has."""
    if not rows:
        return ()
    words: list[str] = [f" Not compared, for {'it lacks' if len(rows) == 1 else 'they lack'} samples"]
    for i, row in enumerate(rows[:NAMED]):
        words += [", " if i else ": ", MethodName(row["method"]), f" ({row['n_ok']} of {row['n_expected']})"]
    return (*words, f" and {len(rows) - NAMED} more." if len(rows) > NAMED else ".")


def _marked(rows: Sequence[TableRow]) -> list[TableRow]:
    """The rows that may be first, the best mean before the others."""
    return sorted((row for row in _scored(rows) if row["mark"]), key=lambda row: -row["score_points_mean"])


def _tied(marked: Sequence[TableRow], others: int) -> Words:
    words = ["Not told apart"]
    for i, row in enumerate(marked[:NAMED]):
        words += [", " if i else ": ", MethodName(row["method"]), f" {number(row['score_points_mean'])}"]
    more = f" and {len(marked) - NAMED} more" if len(marked) > NAMED else ""
    below = {0: "", 1: " The other method is surely not first."}.get(others, f" {others} others are surely not first.")
    return (*words, f"{more}.{below}")


def _cost(rows: Sequence[TableRow]) -> str:
    """What these cells take, from the least to the most: measured bytes, and the time per token where there is one."""
    kept = _range([held_or_read(row)[0] for row in rows], digits=1)
    reading = any(is_of_reading(row["budget"]) for row in rows)
    mib = _range([row.get("stored_bytes_mean", row["kv_bytes_mean"]) / MIB for row in rows], digits=2)
    tpot = _range([1000 * row.get("tpot_s_mean", math.nan) for row in rows], digits=1)
    what = "of the full cache read for a token, all of it held," if reading else "of the full cache,"
    parts = [f"{kept} % {what} {mib} MiB" if kept else "", f"{tpot} ms per token" if tpot else ""]
    return ", ".join(filter(None, parts))


def _range(values: Sequence[float], *, digits: int) -> str:
    """`1.0`, `1.0-2.0`, or nothing."""
    known = [number(value, digits=digits) for value in sorted(values) if not math.isnan(value)]
    return "-".join(dict.fromkeys((known[0], known[-1]))) if known else ""


def _line(table: Table, budget: str, rows: Sequence[TableRow]) -> str:
    """A verdict, how far those that may be first are from the full cache, and who may be last."""
    verdict = _verdict(budget, rows)
    cost = f" ({verdict.cost})" if verdict.cost else ""
    loss = _loss(table, _marked(rows))
    against = f"Against the full cache, with {LEVEL:.0%} intervals: {loss}." if loss else ""
    parts = (f"Budget {clean(budget)}{cost}: {''.join(verdict.said)}", against, _last(table, rows))
    return " ".join(filter(None, parts))


def _loss(table: Table, rows: Sequence[TableRow]) -> str:
    """Cells against `fullkv`: points of score, and nats per token where there are some; nothing without both."""
    points = "" if table.baselines.get("fullkv") is None else _hull(rows, "score_points_vs_fullkv", digits=1)
    if not points:
        return ""
    nats = _hull(rows, "nll_nats_vs_fullkv", digits=3)
    return f"{points} points" + (f", NLL {nats}" if nats else "")


def _hull(rows: Sequence[TableRow], name: str, *, digits: int) -> str:
    """`-2.0 to -1.0 [-3.0, +0.5]`: the least and the highest mean, and what all the intervals together cover."""
    known = [row for row in rows if not math.isnan(row[f"{name}_mean"])]
    if not known:
        return ""
    means, lows, highs = ([row[f"{name}_{part}"] for row in known] for part in ("mean", "low", "high"))
    low = math.nan if any(map(math.isnan, lows)) else min(lows)
    least = "" if min(means) == max(means) else f"{number(min(means), digits=digits, sign='+')} to "
    return least + interval(max(means), low, max(highs), digits=digits, sign="+")


def _last(table: Table, rows: Sequence[TableRow]) -> str:
    """Who may have lost most by the rank intervals; that nothing is told apart where all may; nothing without ranks."""
    ranked = [row for row in rows if not math.isnan(row["rank_low"])]
    last = [row for row in ranked if row["rank_high"] == len(ranked)]
    if not ranked or len(ranked) == len(last):
        return "Nothing is told apart at this budget." if ranked else ""
    if len(last) == 1 and last[0]["rank_low"] == len(ranked):
        told = "" if is_incomplete(last[0]) else f": {_loss(table, last) or score_text(last[0])}"
        return f"{clean(last[0]['method'])}{_on(last[0])} lost most, told apart from every other method{told}."
    named = ", ".join(f"{clean(row['method'])}{_on(row)}" for row in last[:NAMED])
    more = f" and {len(last) - NAMED} more" if len(last) > NAMED else ""
    return f"May have lost most: {named}{more}."
