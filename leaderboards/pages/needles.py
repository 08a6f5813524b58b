"""Needle tasks as heat maps on a page: the mean score by length of the prompt and depth of the needle."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from harness.records.record import Record
from leaderboards.pages.html import HeatTable
from leaderboards.stats.comparable import budget_order
from leaderboards.stats.summaries import BANDS, NEEDLES, band_of
from leaderboards.text import number

PLACE = ["length", "band"]
TITLES = {"niah": "NIAH", "ruler": "RULER needles"}


@dataclass(frozen=True)
class HeatGroup:
    """The maps of one family at one budget, a method each; the last budget of each family is open."""

    title: str
    opened: bool
    heats: Sequence[HeatTable]


def heat_groups(records: Sequence[Record]) -> list[HeatGroup]:
    """The maps by family and budget: in each box the mean over tasks of the task's mean, and how many samples.

    records: one per key, of one table; those of NIAH and of RULER's needle tasks that have a depth and a length count.
    """
    rows = pd.DataFrame(_rows(records), columns=["family", "budget", "method", "task", *PLACE, "score"])
    groups = []
    for family, of_family in rows.groupby("family"):
        lengths, budgets = sorted(of_family["length"].unique()), sorted(of_family["budget"].unique(), key=budget_order)
        for budget in budgets:
            methods = of_family[of_family["budget"] == budget].groupby("method")
            heats = [_heat(str(method), lengths, own) for method, own in methods]
            groups.append(HeatGroup(f"{TITLES[str(family)]}, budget {budget}", budget == budgets[-1], heats))
    return groups


def _rows(records: Sequence[Record]) -> Iterator[tuple[object, ...]]:
    for r in records:
        family, _, name = r.task.partition("/")
        length, band = r.meta.get("length"), band_of(r.meta.get("depth"))
        needle = family == "niah" or (family == "ruler" and name in NEEDLES)
        if needle and band and isinstance(length, int) and r.status == "ok" and "score" in r.metrics:
            yield family, r.budget, r.method, r.task, length, band, 100 * r.metrics["score"]


def _heat(method: str, lengths: Sequence[int], rows: pd.DataFrame) -> HeatTable:
    means = rows.groupby([*PLACE, "task"])["score"].mean().groupby(level=PLACE).mean().to_dict()
    counts = rows.groupby(PLACE).size().to_dict()
    boxes = {
        place: (int(round(mean, 9) // 10), number(mean, digits=0), f"{counts[place]} samples")
        for place, mean in means.items()
    }
    return HeatTable(method, BANDS, [(length, [boxes.get((length, band)) for band in BANDS]) for length in lengths])
