"""CompilerKV's tables for the page of a board: those that its runs used, as plain numbers (leaderboards know no torch).

A run names its tables and their hash. Tables that are not here, or no longer the same, are left out and said.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.records.record import RunManifest
from leaderboards.pages.heats import TableMap
from leaderboards.text import clean
from methods.base import PolicyError

Budgets = Literal["compiled", "onepass"]
USED: tuple[Budgets, ...] = ("compiled", "onepass")
"""Values of the parameter `budgets` of the compiled form that share slots out by tables."""


class _Use(NamedTuple):
    tables: str
    sha256: str
    budgets: Budgets


def table_maps_of(manifests: Iterable[RunManifest]) -> tuple[list[TableMap], list[str]]:
    """Return maps of every table that gave budgets to a method of these runs, and a remark for each that is missing."""
    uses: dict[_Use, dict[str, None]] = defaultdict(dict)
    for method in (method for manifest in manifests for method in manifest.spec.methods):
        if use := _use(method.name, method.params):
            uses[use][method.label] = None
    maps, remarks = list[TableMap](), list[str]()
    for use, labels in uses.items():
        name, users = f"{Path(use.tables).name} ({use.sha256[:12]})", ", ".join(labels)
        if found := _maps(use, name, users):
            maps += found
        else:
            gone = f"tables {name} of {users} are not on this machine as the run used them; no map of them"
            remarks.append(clean(gone))
    return maps, remarks


def _use(name: str, params: dict[str, Any]) -> _Use | None:
    """None where no table decides the budgets."""
    tables, sha256, budgets = (params.get(key) for key in ("tables", "tables_sha256", "budgets"))
    if name != "compilerkv" or params.get("form") != "compiled" or budgets not in USED:
        return None
    return _Use(str(tables), str(sha256), budgets) if tables and sha256 else None


def _maps(use: _Use, name: str, users: str) -> list[TableMap]:
    """One per compiled budget, each [layers, KV heads]; none without these very tables."""
    from methods.compilerkv.policy import folder_of
    from methods.compilerkv.tables import load_tables

    try:
        tables = load_tables(folder_of(use.tables))
    except (PolicyError, OSError, ValueError):  # a name that no folder can have: overlong, or with a NUL
        return []
    if tables.manifest.tensors_sha256 != use.sha256:
        return []
    slots = [(budget, tables.multiples(budget, use.budgets).tolist()) for budget in tables.manifest.budgets]
    return [TableMap(f"{name}, slots of {users}", str(budget), values) for budget, values in slots]
