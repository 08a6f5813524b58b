"""What a source of `docs/figures.toml` says: published boards, kept measurements, constants and recomputations.

Every function takes the folder of the checkout.
"""

import importlib
import json
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from leaderboards.stats.comparable import DIVISIONS

NIGHTS, NULL, OVERLAP = (f"docs/measured/{name}.json" for name in ("nights", "null", "overlap"))
SIGNS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
LOSSES = {"longbench-8k"}
"""Boards of which the pages show what is lost in NLL; of the others they show scores."""


class FigureError(Exception):
    """An entry of the table that cannot be used: what is wrong, the value seen and what to do."""


def values(root: Path, source: Any) -> list[float]:
    """Values of a source; a list is an arithmetic sign and two sources, value by value."""
    if isinstance(source, int | float):
        return [float(source)]
    if isinstance(source, list):
        sign, *both = source
        first, second = (values(root, one) for one in both)
        count = max(len(first), len(second))
        first, second = (one * count if len(one) == 1 else one for one in (first, second))
        return [SIGNS[sign](a, b) for a, b in zip(first, second, strict=True)]
    place, _, asked = source.partition("?")
    if place == "code":
        module, _, name = asked.partition(":")
        try:
            return [float(getattr(importlib.import_module(module), name))]
        except (ImportError, AttributeError) as error:
            raise FigureError(f"{source}: {error}; name a constant that is there") from None
    if place == "call":
        name, *given = asked.split()
        return CALLS[name](root, *given)
    where, _, column = asked.rpartition("#")
    if place.endswith(".csv"):
        return _of_csv(root / "leaderboards/published" / place, where, column)
    return _of_json(root / place, where, column)


def _of_csv(path: Path, where: str, column: str) -> list[float]:
    """A column of the rows that `key=value&key=value|value` picks, one row for each value that is listed."""
    rows, several = _csv(path), ("", [""])
    for part in filter(None, where.split("&")):
        key, _, value = part.partition("=")
        if "|" in value:
            several = (key, value.split("|"))
        else:
            rows = rows[rows[key].astype(str) == value]
    agg, _, name = column.rpartition(":")
    picked = [rows[rows[several[0]].astype(str) == value] if several[0] else rows for value in several[1]]
    for found in picked:
        if len(found) != 1 and not agg:
            raise FigureError(f"{path.name}?{where} picks {len(found)} rows; name one, or max: or nunique:")
    return [float(found[name].agg(agg) if agg else found[name].iloc[0]) for found in picked]


@cache
def _csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path)


def _of_json(path: Path, names: str, key: str) -> list[float]:
    """A value of a result of a file of `tests/measured.py`; of several results, `a|b`, one each."""
    kept = [_kept(path, name) for name in names.split("|")]
    key, _, at = key.partition(".")
    return [float(one[key][int(at)] if at else one[key]) for one in kept]


def board(root: Path, name: str) -> pd.DataFrame:
    """A published board by (budget, method): of one with two divisions that of the official tasks."""
    frame = _csv(root / f"leaderboards/published/{name}.csv")
    if "division" in frame:
        frame = frame[frame["division"] == DIVISIONS[0]]
    return frame.astype({"budget": str}).set_index(["budget", "method"]).sort_index()


def score(cell: pd.Series) -> str:
    """As the pages show a score: half of its interval, the places it may have, bold where only the first is left."""
    half = (cell.score_points_high - cell.score_points_low) / 2
    text = f"{cell.score_points_mean:.1f} ± {half:.1f}"
    if pd.isna(cell.rank_low):
        return text
    low, high = int(cell.rank_low), int(cell.rank_high)
    return (f"**{text}**" if high == 1 else text) + f" ({low if low == high else f'{low}-{high}'})"


def loss(cell: pd.Series) -> str:
    """As the pages show nats lost against the full cache."""
    mean, low, high = (cell[f"nll_nats_vs_fullkv_{part}"] for part in ("mean", "low", "high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def boards(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of means: board, method, and a cell for each budget, empty where the board has not got it."""
    name, method = row[0].strip("`"), row[1].strip("`*")
    published = board(root, name)
    cells = []
    for budget in head[2:]:
        if budget not in published.index.get_level_values("budget"):
            cells.append("")
        elif method == "share of the bytes":
            cells.append(f"{published.loc[budget].kv_percent_of_full.max():.1f} %")
        else:
            cell = published.loc[budget, method]
            cells.append(loss(cell) if name in LOSSES else score(cell))
    return [*row[:2], *cells]


def phases(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of the table of seconds by phase, of the board `serving` at 8,192 tokens; 0 below a hundredth."""
    served = _csv(root / "leaderboards/published/serving.csv")
    ((_, of),) = served[(served.tokens == 8192) & (served.method == row[0].strip("`"))].iterrows()
    seconds = [f"{of.prefill_s_median:.1f}", f"{of.observe_s_median:.1f}", f"{of.compress_s_median:.2f}"]
    peaks = f"{of.peak_bytes / 2**20:.0f} / {of.predicted_bytes / 2**20:.0f} MiB"
    return [row[0], *("0" if float(s) == 0 else s for s in seconds), f"{1000 * of.tpot_s_median:.0f} ms", peaks]


def _kept(path: Path, name: str) -> dict[str, Any]:
    """A result of a file of `tests/measured.py`."""
    results: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    if name not in results:
        raise FigureError(f"{path.name} has no result {name!r}; run the command that measures it, or drop the figure")
    return results[name]


def claims(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of boards of equal methods: the share with any wrong claim, by rule."""
    from tests.null import BOARDS, RULES

    kept = _kept(root / NULL, f"claims {row[0].strip('`')}, {row[2]}")
    shape = BOARDS[row[0].strip("`")]
    size = f"{shape.methods} x {shape.budgets} x {shape.tasks}"
    return [row[0], size, row[2], *(f"{kept[f'{rule}_percent']:.1f}" for rule in RULES)]


def least_seen(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of the differences that boards say they see, and of how often they are found in score and NLL."""
    kept = _kept(root / NULL, f"seen {row[0].strip('`')}, 0.05")
    often = (", ".join(f"{share:.0f}" for share in kept[f"{rule}_percent"]) for rule in ("holm", "new"))
    return [row[0], f"{kept['points']:.1f}", f"{kept['nats']:.3f}", *often]


def ratios(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of what `make bench` measured: median, least and most of the rounds, goal, threads, load of the machine."""
    kept = _kept(root / "docs/measured/bench.json", row[0].strip("`"))
    spread = f"{min(kept['rounds']):.2f} to {max(kept['rounds']):.2f}, {len(kept['rounds'])}"
    met = kept["goal"] is None or {"<=": operator.le, ">=": operator.ge}[kept["goal"][0]](
        kept["median"], kept["goal"][1]
    )
    goal = "" if kept["goal"] is None else f"{kept['goal'][0]} {kept['goal'][1]:g}{'' if met else ', missed'}"
    return [row[0], f"{kept['median']:.2f}", spread, goal, f"{kept['threads']}", f"{kept['load']:.0f}"]


def nights_fail(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of the share of pretend nights that fail, in percent: whole numbers without decimals."""
    kept = _kept(root / NIGHTS, f"fails {row[0]}, {row[1]}, {row[2]}")
    return [*row[:3], *(f"{value:.1f}".removesuffix(".0") for value in kept["values"])]


def nights_need(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of the prompts of each task with which four of five nights fail, of those that were tried."""
    kept = _kept(root / NIGHTS, f"needs {row[0]}, {row[1]}")
    return [*row[:2], *(f"{value or 'more'}" for value in kept["values"])]


def overlaps(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of the largest overlap of any two prompts of a board, with its contexts by protocol and drawn."""
    both = [_kept(root / OVERLAP, f"{row[0].strip('`')}, {contexts}")["share"] for contexts in ("protocol", "drawn")]
    shown = [f"{share:.3f}".removeprefix("0") for share in both]
    return [row[0], shown[0], shown[1] + "".join(row[2].partition(" ")[1:])]


def kinds(root: Path, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of kinds of methods at the same bytes: budget, kind, its best, NLL and gain, of the needle or of prose."""
    of = _csv(root / "leaderboards/published/neighbours.frontiers.csv")
    division = "own tasks" if "prose" in head[-1] else "official tasks"
    found = of[(of.division == division) & (of.measure == "nll") & (of.budget == float(row[0])) & (of.kind == row[1])]
    ((_, cell),) = found.iterrows()
    best = ", ".join(f"`{label}`" for label in cell.chosen.split(", "))
    gain = "-" if pd.isna(cell.gain) else f"{cell.gain:+.2f} [{cell.low:+.2f}, {cell.high:+.2f}]"
    return [*row[:2], best, f"{cell.percent:.0f} %", f"{cell['mean']:.2f}", gain]


CELLS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], list[str]]] = {
    "boards": boards,
    "claims": claims,
    "kinds": kinds,
    "least_seen": least_seen,
    "nights_fail": nights_fail,
    "nights_need": nights_need,
    "overlaps": overlaps,
    "phases": phases,
    "ratios": ratios,
}


def full_cache(root: Path, name: str) -> list[float]:
    """Mean and half of the interval of the full cache's score on a board, in points."""
    full = board(root, name).loc["full", "fullkv"]
    return [full.score_points_mean, (full.score_points_high - full.score_points_low) / 2]


def next_means(root: Path, budget: str) -> list[float]:
    """The lowest and the highest of the three means of `baselines` that follow CompilerKV's at a budget."""
    means = board(root, "baselines").loc[budget].score_points_mean.drop("compilerkv").nlargest(3)
    return [means.min(), means.max()]


def search(root: Path) -> list[float]:
    """Trials and prompts of `harness tune`, the same in every packaged artefact."""
    kept = [json.loads(path.read_text()) for path in (root / "methods/tuned/chosen").glob("*/*.json")]
    ((trials, prompts),) = {(len(one["trials"]), len(one["prompts"])) for one in kept}
    return [trials, prompts]


def preset(root: Path, label: str, parameter: str) -> list[float]:
    from methods.registry import make_policy

    return [float(getattr(make_policy(label), parameter))]


def _new_claims(root: Path, kind: str) -> list[float]:
    results = json.loads((root / NULL).read_text(encoding="utf-8"))["results"]
    return [one["new_percent"] for name, one in results.items() if name.startswith("claims ") and f", {kind}," in name]


def mean_claims(root: Path, kind: str) -> list[float]:
    """Mean over the pretend boards of a kind of the percentage that the new rule makes a wrong claim on."""
    found = _new_claims(root, kind)
    return [sum(found) / len(found)]


def claims_range(root: Path, kind: str) -> list[float]:
    """The least and the greatest of the same."""
    found = _new_claims(root, kind)
    return [min(found), max(found)]


def passes(root: Path, share: str) -> list[float]:
    """The chance that a rule with that share of false claims passes the suite's simulation, binomially."""
    from scipy.stats import binom

    from tests.leaderboards.stats.test_null import COUNT, MOST

    return [float(binom.cdf(MOST, COUNT, float(share)))]


def falling(root: Path) -> list[float]:
    """Points of the method that falls to 0 in pretend nights, at both budgets; then what finds such a fall.

    That is the packaged board's prompts a task, and of 100 nights those in which a method of 50, and one of 30 points,
    has three of them right or more.
    """
    from scipy.stats import binom

    from harness.boards.sources import read_config
    from tests.night_power import CELLS, ONE, TASKS

    limit = read_config("nightly")["limit"]
    return [*(100 * TASKS[0] * CELLS[ONE]), limit, *(100 * float(binom.sf(2, limit, share)) for share in (0.5, 0.3))]


def peaks_as_predicted(root: Path) -> list[float]:
    """Cells of the board `serving` whose peak is within `ALARM` of its prediction, and all of them."""
    alarm = _csv(root / "leaderboards/published/serving.csv").alarm
    return [float((~alarm.astype(bool)).sum()), float(len(alarm))]


def faults(root: Path) -> list[float]:
    """Runs on Ray that were disturbed, what was killed in all, and of it workers, nodes and drivers."""
    return _struck(root, "seed", ("worker", "node", "driver"))


def faults_alone(root: Path) -> list[float]:
    """Runs without Ray that were disturbed, how often in all, and of it by SIGKILL, by SIGTERM and by a full disk."""
    return _struck(root, "alone", ("kill", "term", "disk"))


def _struck(root: Path, campaign: str, kinds: Sequence[str]) -> list[float]:
    kept = json.loads((root / "docs/measured/faults.json").read_text(encoding="utf-8"))["results"]
    results = {name: one for name, one in kept.items() if name.startswith(campaign)}
    if wrong := [name for name, one in results.items() if one["wrong"]]:
        raise FigureError(f"faults.json has runs that came out wrong: {wrong}; the page says that none did")
    struck = Counter(kind for one in results.values() for kind in one["struck"])
    return [len(results), struck.total(), *(struck[kind] for kind in kinds)]


def importance_spearman(root: Path) -> list[float]:
    """The least and the greatest Spearman of the packaged slots, by budget, with the importance of heads."""
    from methods.compilerkv.policy import folder_of
    from methods.compilerkv.selection import spearman
    from methods.compilerkv.tables import load_tables

    tables = load_tables(folder_of("smollm2-135m"))
    found = [spearman(tables.budget[i], tables.importance[0]) for i in range(len(tables.manifest.budgets))]
    return [min(found), max(found)]


CALLS: dict[str, Callable[..., list[float]]] = {
    "claims_range": claims_range,
    "falling": falling,
    "faults": faults,
    "faults_alone": faults_alone,
    "full_cache": full_cache,
    "importance_spearman": importance_spearman,
    "mean_claims": mean_claims,
    "next_means": next_means,
    "passes": passes,
    "peaks_as_predicted": peaks_as_predicted,
    "preset": preset,
    "search": search,
}
