"""What follows the ranking of a board, as tables of text: rivals, tasks, ranks, tails and the averages of suites."""

import math
from collections.abc import Collection

import pandas as pd

from leaderboards.stats import ranks, worst
from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.comparable import NOT_GIVEN
from leaderboards.stats.ranks import PAIRED, SUFFIXES
from leaderboards.tables.verdicts import has_other_samples
from leaderboards.tables.visible import TITLE, visible_frame
from leaderboards.text import KEYS, MIB, clean, distinct, estimate, half_width, interval, keys, number, rank_text

FLAGS = {"incomplete": "i", "skipped": "s", "failed": "f", "oom": "o", "over_budget": "b", "under_budget": "l"}
FLAGS |= {"few": "w", "unknown": "u", "other_samples": "x", "timed_on_fewer": "t", "resumed": "r", "uncompiled": "c"}
"""Flag of a row to its letter."""
LACKS = " (lacks samples)"
"""What marks a method beside others that have samples which it lacks."""
PAIRS = "Methods of their own budget against others at what they kept"
RIVAL_TITLES = {"nll": ("NLL, nats per token", 3), "score": ("score, 0-100", 1)}
"""Measure to its words in a title and its decimals."""


def sections(table: Table) -> dict[str, pd.DataFrame]:
    """Title to frame of everything below the ranking, one row per budget and method or family.

    A method whose row is over other samples than those beside it is marked in words.
    """
    lacking = lacks(table)
    found = {**frontier_frames(table.frontiers), **rival_frames(table.rivals), "Score by task": task_frame(table)}
    if len(table.visible):
        found[TITLE] = visible_frame(table.visible)
    if len(table.pairs):
        found[PAIRS] = pd.DataFrame([_pair_texts(row) for row in table.pairs.to_dict("records")])
    limited = table.rows[~table.rows["budget"].isin(NOT_GIVEN)]
    if (ranked := ranks.is_ranked(table.rows)) or (limited["best_other"] != "").any():
        found["Ranks and best others" if ranked else "Best others"] = pd.DataFrame(
            [keyed(row, lacking) | _rank_texts(row, ranked=ranked) for row in limited.to_dict("records")]
        )
    for floor, rows in table.floors.groupby("floor") if len(table.floors) else ():
        found[f"Smallest cache that keeps {floor} % of fullkv, in % of its bytes"] = _floor_frame(rows, lacking)
    if len(table.lengths):
        most = table.lengths["n"].max()
        fewer = {(row["budget"], row["method"]) for row in table.lengths.to_dict("records") if row["n"] < most}
        own = table.lengths.to_dict("records")
        found["Long outputs"] = pd.DataFrame([keyed(row, fewer) | _length_texts(row) for row in own])
    if len(table.relay):
        own = table.relay.to_dict("records")
        found["Relay"] = pd.DataFrame([keyed(row, lacking) | _relay_texts(row) for row in own])
    if worst.is_known(table.rows):
        every = table.rows.to_dict("records")
        found["Tail failures"] = pd.DataFrame([keyed(row, lacking) | _tail_texts(row) for row in every])
    for title, rows in table.summaries.groupby("title", sort=False):
        found[clean(title)] = _summary_frame(rows)
    return found


def lacks(table: Table, *, flag: str = "") -> frozenset[tuple[str, str]]:
    """Budget and method of the rows that lack samples which another row has; or of those with one flag alone."""
    rows = table.rows.to_dict("records")
    here = (row for row in rows if (flag in row["flags"].split() if flag else has_other_samples(row)))
    return frozenset((row["budget"], row["method"]) for row in here)


def keyed(row: TableRow, lacking: Collection[tuple[str, str]]) -> dict[str, str]:
    """The cells that name a row, marked where it is in `lacking`."""
    named = keys(row)
    return named | {"method": named["method"] + LACKS} if (row["budget"], row["method"]) in lacking else named


def rival_frames(rivals: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title to frame of the subject against its rivals, one per measure that has rows."""
    frames = {}
    for measure, (words, digits) in RIVAL_TITLES.items():
        rows = rivals[rivals["measure"] == measure].to_dict("records")
        if rows:
            title = f"{clean(rows[0]['subject'])} against the strongest other method of each family: {words}"
            frames[title] = pd.DataFrame([_rival_texts(row, digits, losses=measure == "nll") for row in rows])
    return frames


def frontier_frames(frontiers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title to frame of kinds of methods at the same bytes, one per measure that has rows."""
    frames = {}
    for measure, (words, digits) in RIVAL_TITLES.items():
        if rows := frontiers[frontiers["measure"] == measure].to_dict("records") if len(frontiers) else []:
            frames[f"Kinds of methods at the same bytes: {words}"] = pd.DataFrame(
                [_frontier_texts(row, digits) for row in rows]
            )
    return frames


def task_frame(table: Table) -> pd.DataFrame:
    """Mean score per task, a column each; `(n)` behind a mean that lacks samples of its budget."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    heads, other = distinct(table.tasks["task"], beside=KEYS), lacks(table, flag="other_samples")
    for row in table.tasks.to_dict("records"):
        n = row["n_ok"]
        text = number(row["score_points_mean"]) + (f" ({n})" if 0 < n < row["n_expected"] else "")
        rows.setdefault((row["budget"], row["method"]), keyed(row, other))[heads[row["task"]]] = text
    return pd.DataFrame(list(rows.values()))


def flag_letters(flags: str) -> str:
    """The letters of a row's flags, in the order of `FLAGS`."""
    return "".join(letter for flag, letter in FLAGS.items() if flag in flags.split())


def _floor_frame(rows: pd.DataFrame, lacking: Collection[tuple[str, str]]) -> pd.DataFrame:
    """A row per method, those that need least first, a column per family. Who lacks samples comes last."""
    fewer = {method for _, method in lacking}
    means = rows.groupby("method")["percent"].mean().sort_values(kind="stable")
    order = sorted(means.index, key=lambda method: method in fewer)
    found = {method: {"method": clean(method) + (LACKS if method in fewer else "")} for method in order}
    heads = distinct(rows["family"], beside=["method"])
    for row in rows.to_dict("records"):
        found[row["method"]][heads[row["family"]]] = _floor_text(row)
    return pd.DataFrame(list(found.values())).fillna("-")


def _floor_text(row: TableRow) -> str:
    def told(percent: float) -> str:
        if percent > row["largest"] * (1 + 1e-9):
            return f">{row['largest']:.1f}"
        return f"≤{row['smallest']:.1f}" if percent <= row["smallest"] * (1 + 1e-9) else f"{percent:.1f}"

    ends = "" if math.isnan(row["low"]) else f" [{told(row['low'])}, {told(row['high'])}]"
    return told(row["percent"]) + ends


def _pair_texts(row: TableRow) -> dict[str, str]:
    return {
        "method": clean(row["method"]),
        "against": clean(row["rival"]),
        "kept %": number(row["kept_percent"]),
        "its %": number(row["rival_percent"]),
        "score": number(row["score_points_own"]),
        "its score": number(row["score_points_rival"]),
        "Δ score": estimate(row, "score_points_vs_rival", sign="+"),
        "ΔNLL": estimate(row, "nll_nats_vs_rival", digits=3, sign="+"),
        "n": str(row["n"]),
    }


def _length_texts(row: TableRow) -> dict[str, str]:
    return {
        "length / fullkv": estimate(row, "inflation", digits=2),
        "ended %": number(row["ended"]),
        "until error %": number(row["until"]),
        "right %": number(row["right"]),
        "end MiB": number(row["stored_bytes_end"] / MIB, digits=2),
        "cost / fullkv": estimate(row, "cost", digits=2),
        "n": str(row["n"]),
    }


def _relay_texts(row: TableRow) -> dict[str, str]:
    return {
        "score": number(row["score_points_mean"]),
        "sent MiB": number(row["sent_bytes_mean"] / MIB, digits=3),
        "text MiB": number(row["text_bytes_mean"] / MIB, digits=3),
        "first s": number(row["cache_s_median"], digits=3),
        "text first s": number(row["text_s_median"], digits=3),
        "link MiB/s": number(row["link_bytes_per_s"] / MIB),
        "control": f"{row['depends_n']} of {row['control_n']}" if row["control_n"] else "-",
        "n": str(row["n"]),
    }


def _summary_frame(rows: pd.DataFrame) -> pd.DataFrame:
    """One summary; behind a mean of fewer tasks or samples than belong to it, how many they are."""
    found, heads = [], distinct(rows["column"], beside=[*KEYS, "flags"])
    for _, of_cell in rows.groupby(KEYS, sort=False):
        own = of_cell.to_dict("records")
        texts = {heads[row["column"]]: _summary_text(row) for row in own}
        found.append({**keys(own[0]), **texts, "flags": flag_letters(" ".join(row["flags"] for row in own))})
    return pd.DataFrame(found)


def _summary_text(row: TableRow) -> str:
    tasks = f"{row['tasks_present']} of {row['tasks_expected']}" if row["tasks_present"] < row["tasks_expected"] else ""
    samples = f"n {row['n']}/{row['n_expected']}" if row["n"] < row["n_expected"] else ""
    lacking = ", ".join(part for part in (tasks, samples) if part)
    return half_width(row["mean"], row["low"], row["high"]) + (f" ({lacking})" if lacking else "")


def _rank_texts(row: TableRow, *, ranked: bool) -> dict[str, str]:
    low, high = number(row["score_task_low"]), number(row["score_task_high"])
    cells = {"over tasks": "-" if low == "-" else f"[{low}, {high}]"}
    for measure, suffix in SUFFIXES.items():
        digits, words = (1, "") if measure == "score" else (3, " NLL")
        if ranked:
            cells[f"rank{words}"] = rank_text(row[f"rank{suffix}_low"], row[f"rank{suffix}_high"])
        cells[f"best other{words}"] = clean(row[f"best_other{suffix}"]) or "-"
        cells[f"Δ{words.strip()} best other"] = estimate(row, PAIRED[measure], digits=digits, sign="+")
    return cells


def _tail_texts(row: TableRow) -> dict[str, str]:
    n = row["broken_percent_n"]
    return {
        "broken %": estimate(row, "broken_percent"),
        "broken": f"{row['n_broken']:.0f} of {n}" if n else "-",
        "NLL worst 10%": number(row["nll_worst_nats_mean"], digits=3),
        "Δ fullkv": number(row["nll_worst_nats_vs_fullkv_mean"], digits=3, sign="+"),
        "n worst": str(row["nll_worst_nats_n"]),
    }


def _frontier_texts(row: TableRow, digits: int) -> dict[str, str]:
    return {
        "budget": clean(row["budget"]),
        "kind": clean(row["kind"]),
        "best": clean(row["chosen"]),
        "held %": number(row["percent"]),
        "mean": number(row["mean"], digits=digits),
        "gain": interval(row["gain"], row["low"], row["high"], digits=digits, sign="+"),
        "against": clean(row["against"]) or "-",
        "verdict": row["verdict"] or "-",
        "n": str(row["n"]),
    }


def _rival_texts(row: TableRow, digits: int, *, losses: bool) -> dict[str, str]:
    cells = {
        **{name: clean(row[name]) for name in ("budget", "family", "tasks", "n")},
        "subject": number(row["subject_mean"], digits=digits),
        "rival": clean(row["rival"]) or "-",
        "rival's": number(row["rival_mean"], digits=digits),
        "gain": interval(row["gain"], row["low"], row["high"], digits=digits, sign="+"),
        "verdict": row["verdict"],
    }
    if losses:
        cells["loss"] = number(row["subject_loss"], digits=digits)
        cells["rival's loss"] = number(row["rival_loss"], digits=digits)
        cells["loss ratio"] = number(row["loss_ratio"], digits=2)
    return cells
