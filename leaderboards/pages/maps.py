"""Compiled tables as heat maps on a page: the slots of every layer and KV head. The caller brings plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError
from leaderboards.pages.html import HeatTable
from leaderboards.text import clean, number

SHADES = 10


@dataclass(frozen=True)
class TableMap:
    """One compiled table at one budget. name: what it is and who uses it, equal for all its budgets.

    values: [layers, KV heads], finite and 0 or more.
    """

    name: str
    budget: str
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class ShadedTable:
    """The maps of one compiled table, one per budget, all shaded by its largest value, `top`."""

    name: str
    top: float
    heats: Sequence[HeatTable]


def shaded_tables(maps: Sequence[TableMap]) -> list[ShadedTable]:
    """The maps under their names, in the order given.

    Raises HarnessError for values that are no finite matrix.
    """
    found = []
    for name in dict.fromkeys(one.name for one in maps):
        own = [(one.budget, _matrix(one)) for one in maps if one.name == name]
        top = max(float(values.max()) for _, values in own)
        found.append(ShadedTable(name, top, [_heat(budget, values, top) for budget, values in own]))
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


def _heat(budget: str, values: npt.NDArray[Any], top: float) -> HeatTable:
    rows = [(f"head {h}", [_box(value, n, h, top) for n, value in enumerate(row)]) for h, row in enumerate(values.T)]
    return HeatTable(f"Budget {budget}", range(len(values)), rows)


def _box(value: float, layer: int, head: int, top: float) -> tuple[int, str, str]:
    return round(SHADES * float(value) / top) if top else 0, number(value), f"layer {layer}, head {head}"
