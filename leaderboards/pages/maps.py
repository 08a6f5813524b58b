"""Compiled tables as heat maps on a page: the slots of every layer and KV head. The caller brings plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError
from leaderboards.pages.html import element, text
from leaderboards.text import clean, number

SHADES = 10
ABOUT = (
    "Slots of each KV head, as a multiple of the mean over all heads: how a compiled table shares a budget. Across: "
    "layers from the first. Down: KV heads. All maps of one table have the same shades."
)


@dataclass(frozen=True)
class TableMap:
    """One compiled table at one budget. name: what it is and who uses it, equal for all its budgets.

    values: [layers, KV heads], finite and 0 or more.
    """

    name: str
    budget: str
    values: Sequence[Sequence[float]]


def table_maps(maps: Sequence[TableMap]) -> str:
    """The maps under their names, in the order given; nothing without any.

    Raises HarnessError for values that are no finite matrix.
    """
    parts = []
    for name in dict.fromkeys(one.name for one in maps):
        own = [(one.budget, _matrix(one)) for one in maps if one.name == name]
        top = max(float(values.max()) for _, values in own)
        grids = "".join(_grid(budget, values, top) for budget, values in own)
        parts.append(f"<h3>{text(name)}</h3><p>Shades from 0 to {number(top)}.</p>{grids}")
    return f"<p>{ABOUT}</p>{''.join(parts)}" if parts else ""


def _matrix(one: TableMap) -> npt.NDArray[Any]:
    try:
        values = np.asarray(one.values, dtype=float)  # [L, H]
    except ValueError:
        values = np.empty(0)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or values.min() < 0:
        wanted = "give a finite number, 0 or more, for each layer and KV head"
        raise HarnessError(f"table {clean(one.name)} at {clean(one.budget)} is no matrix; {wanted}")
    return values


def _grid(budget: str, values: npt.NDArray[Any], top: float) -> str:
    layers, heads = values.shape
    head = "".join(f"<th scope=col>{layer}</th>" for layer in range(layers))
    rows = "".join(
        f"<tr><th scope=row>head {h}</th>{''.join(_box(float(values[n, h]), n, h, top) for n in range(layers))}</tr>"
        for h in range(heads)
    )
    caption = element("caption", f"Budget {text(budget)}", {})
    table = f'<table class="heat dense">{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return element("div", table, {"class": "scroll", "role": "region", "aria-label": f"Map {budget}", "tabindex": "0"})


def _box(value: float, layer: int, head: int, top: float) -> str:
    shade = round(SHADES * value / top) if top else 0
    return f'<td class="h{shade}" title="layer {layer}, head {head}">{number(value)}</td>'
