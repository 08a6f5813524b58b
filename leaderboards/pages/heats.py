"""Heat maps on a page: needle tasks by length of the prompt and depth of the needle, and compiled tables."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.errors import HarnessError
from harness.records.record import Record
from leaderboards.stats.comparable import budget_order
from leaderboards.stats.summaries import BANDS, NEEDLES, band_of
from leaderboards.tables.sections import LACKS
from leaderboards.text import clean, number

PLACE = ["length", "band"]
TITLES = {"niah": "NIAH", "ruler": "RULER needles"}
SHADES = 10


class HeatTable(NamedTuple):
    """rows: of each its head and its boxes: shade 0-10, what it shows, and words about it; None where nothing is."""

    caption: str
    columns: Sequence[object]
    rows: Sequence[tuple[object, Sequence[tuple[int, str, str] | None]]]


class HeatGroup(NamedTuple):
    """The maps of one family at one budget, a method each; the last budget of each family is open."""

    title: str
    opened: bool
    heats: Sequence[HeatTable]


class TableMap(NamedTuple):
    """One compiled table at one budget. name: what it is and who uses it, equal for all its budgets.

    values: [layers, KV heads], finite and 0 or more.
    """

    name: str
    budget: str
    values: Sequence[Sequence[float]]


class ShadedTable(NamedTuple):
    """The maps of one compiled table, one per budget, all shaded by its largest value, `top`."""

    name: str
    top: float
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
            most = int(methods.size().max())
            named = ((f"{method}{LACKS if len(own) < most else ''}", own) for method, own in methods)
            heats = [_needle_heat(name, lengths, own) for name, own in named]
            groups.append(HeatGroup(f"{TITLES[str(family)]}, budget {budget}", budget == budgets[-1], heats))
    return groups


def _rows(records: Sequence[Record]) -> Iterator[tuple[object, ...]]:
    for r in records:
        family, _, name = r.task.partition("/")
        length, band = r.meta.get("length"), band_of(r.meta.get("depth"))
        needle = family == "niah" or (family == "ruler" and name in NEEDLES)
        if needle and band and isinstance(length, int) and r.status == "ok" and "score" in r.metrics:
            yield family, r.budget, r.method, r.task, length, band, 100 * r.metrics["score"]


def _needle_heat(method: str, lengths: Sequence[int], rows: pd.DataFrame) -> HeatTable:
    means = rows.groupby([*PLACE, "task"])["score"].mean().groupby(level=PLACE).mean().to_dict()
    counts = rows.groupby(PLACE).size().to_dict()
    boxes = {
        place: (int(round(mean, 9) // 10), number(mean, digits=0), f"{counts[place]} samples")
        for place, mean in means.items()
    }
    return HeatTable(method, BANDS, [(length, [boxes.get((length, band)) for band in BANDS]) for length in lengths])


def shaded_tables(maps: Sequence[TableMap]) -> list[ShadedTable]:
    """The maps under their names, in the order given. Raises HarnessError for values that are no finite matrix."""
    found = []
    for name in dict.fromkeys(one.name for one in maps):
        own = [(one.budget, _matrix(one)) for one in maps if one.name == name]
        top = max(float(values.max()) for _, values in own)
        found.append(ShadedTable(name, top, [_slot_heat(budget, values, top) for budget, values in own]))
    return found


def _matrix(one: TableMap) -> npt.NDArray[Any]:
    try:
        values = np.asarray(one.values, dtype=float)  # [L, H]
    except ValueError:
        values = np.empty(0)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or values.min() < 0:
        wanted = "give a finite number, 0 or more, for each layer and KV head"
        raise HarnessError(f"table {clean(one.name)} at {clean(one.budget)} is no matrix; {wanted}")
    return values


def _slot_heat(budget: str, values: npt.NDArray[Any], top: float) -> HeatTable:
    shades = (SHADES * values / (top or 1)).round().astype(int)
    rows = []
    for head, slots in enumerate(values.T):
        words = (f"layer {layer}, head {head}" for layer in range(len(slots)))
        rows.append((f"head {head}", list(zip(shades[:, head].tolist(), map(number, slots), words, strict=True))))
    return HeatTable(f"Budget {budget}", range(len(values)), rows)
