"""Figures of the pages against what they come from: `python -m tests.figures [--mend]`, or `make figures`.

`docs/figures.toml` says where each number of README.md and docs/ comes from; its head explains the entries. A line is
printed for each figure: page, what the page says, what its source says, verdict. The command ends with 1 when one of
them has drifted, or a page has a number that no entry covers. `--mend` writes what the sources say into the pages; what
a sentence claims of a number is for a person to read again.

Published CSV files count as sources because they follow from `leaderboards/published/records` to the byte
(`tests/boards/test_sources.py`).
"""

import argparse
import importlib
import json
import operator
import re
import sys
import tomllib
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TABLE = "docs/figures.toml"
NULL = "docs/measured/null.json"
PAGES = r"README\.md|docs/(?!method-reference)[^/]*\.md"
"""Whose numbers all need an entry; the page of every method is written by `make docs` and held by its own test."""
NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
STANDING = re.compile(r"(?<![\w.,])(?<!\w-)(?:\d(?:[\d,]*\d)?(?:\.\d+)*|\.\d+)")
"""A number that is no part of a name, such as int8, Qwen2.5 or SmolLM2-135M."""
NOT_READ = re.compile(
    r"^```.*?^```|`(?:[^`\n]|\n(?!\n))*`|\]\([^)\s]*(?:\s+\"[^\"]*\")?\)|https?://\S+|^\d+\. ", re.M | re.S
)  # code, targets of links, the numbers of a list
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


@dataclass(frozen=True)
class Shown:
    """Something that a page says. span: of its text in the page; said and found: by the page and by its source."""

    page: str
    span: tuple[int, int]
    said: str
    found: str
    source: str
    ok: bool


@dataclass(frozen=True)
class Checkout:
    """A folder with the pages, their table of figures and the sources."""

    root: Path
    entries: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, root: Path | None = None) -> "Checkout":
        """Of a folder; this checkout by itself."""
        root = root or ROOT
        return cls(root, tomllib.loads((root / TABLE).read_text(encoding="utf-8")))

    def pages(self) -> list[str]:
        found = [
            path.relative_to(self.root).as_posix() for path in (*self.root.glob("*.md"), *self.root.glob("*/*.md"))
        ]
        return sorted(page for page in found if re.fullmatch(PAGES, page))

    def text(self, page: str) -> str:
        return (self.root / page).read_text(encoding="utf-8")


def shown(checkout: Checkout) -> list[Shown]:
    """Everything that entries with a source cover, in the order of the table.

    Raises: FigureError when an entry names what is not there.
    """
    figures = [one for entry in checkout.entries["figure"] for one in _figure(checkout, entry)]
    return figures + [one for entry in checkout.entries["table"] for one in _table(checkout, entry)]


def uncovered(checkout: Checkout) -> list[str]:
    """Numbers outside code that no entry covers: a line each with the place and the line it stands in."""
    lines = []
    for page in checkout.pages():
        text = checkout.text(page)
        spans = [*_covered(checkout, page, text), *(found.span() for found in NOT_READ.finditer(text))]
        starts = [found.start() for found in re.finditer("^", text, re.M)]
        for found in STANDING.finditer(text):
            if not any(low <= found.start() and found.end() <= high for low, high in spans):
                at = bisect(starts, found.start())
                line = text.splitlines()[at - 1].strip()
                lines.append(f"{page}:{at}: {found[0]} has no source in {TABLE}: {line}")
    return lines


def _covered(checkout: Checkout, page: str, text: str) -> Iterator[tuple[int, int]]:
    for entry in checkout.entries["figure"]:
        if entry["page"] == page:
            yield _match(text, entry).span()
    for entry in checkout.entries["table"]:
        if entry["page"] == page:
            yield _lines_of_table(text, entry)
    for entry in checkout.entries["constant"]:
        if entry["page"] == page:
            for says in entry["says"]:
                yield _match(text, {**entry, "says": says}).span()
    for entry in checkout.entries["kind"]:
        yield from (found.span() for found in re.finditer(entry["pattern"], text))


def _match(text: str, entry: dict[str, Any]) -> re.Match[str]:
    """Where a page has an excerpt, in which {} is a number and a space any white space."""
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in entry["says"].split("{}")]
    found = list(re.finditer(f"({NUMBER})".join(parts), text))
    if len(found) != 1:
        raise FigureError(
            f"{entry['page']} has {len(found)} times {entry['says']!r}; give an excerpt that is there once in {TABLE}"
        )
    return found[0]


def _figure(checkout: Checkout, entry: dict[str, Any]) -> Iterator[Shown]:
    match = _match(checkout.text(entry["page"]), entry)
    values = [(source, value) for source in entry["from"] for value in _values(checkout, source)]
    if len(values) != len(match.groups()):
        raise FigureError(
            f"{entry['page']}: {entry['says']!r} has {len(match.groups())} numbers, its sources {len(values)}; "
            f"give one value for each in {TABLE}"
        )
    for i, (source, value) in enumerate(values, start=1):
        said, found = match[i], _as(match[i], value)
        near = abs(float(said.replace(",", "")) - value) <= entry.get("tolerance", 0)
        yield Shown(entry["page"], match.span(i), said, found, str(source), said == found or near)


def _as(said: str, value: float) -> str:
    """A value with as many decimals, and commas, as the page has."""
    text = f"{value:{',' if ',' in said else ''}.{len(said.partition('.')[2])}f}"
    text = text.removeprefix("-") if float(text.replace(",", "")) == 0 else text
    return text.removeprefix("0") if said.startswith(".") else text


def _lines_of_table(text: str, entry: dict[str, Any]) -> tuple[int, int]:
    found = [at.start() for at in re.finditer(r"^" + re.escape(entry["head"]), text, re.M)]
    if len(found) != 1:
        raise FigureError(f"{entry['page']} has {len(found)} tables headed {entry['head']!r}; mend it in {TABLE}")
    end = re.compile(r"^(?!\|)", re.M).search(text, found[0])
    return found[0], end.start() if end else len(text)


def _table(checkout: Checkout, entry: dict[str, Any]) -> Iterator[Shown]:
    """Every cell of a table, by the function that `cells` names."""
    text = checkout.text(entry["page"])
    start, end = _lines_of_table(text, entry)
    head, *rows = [list(_cells(line, start + at)) for at, line in _lines(text[start:end]) if "---" not in line]
    expected_of = CELLS[entry["cells"]]
    for row in rows:
        texts = [cell for cell, _ in row]
        for (said, span), found in zip(row, expected_of(checkout, [cell for cell, _ in head], texts), strict=True):
            yield Shown(entry["page"], span, said, found, entry["cells"], said == found)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    at = 0
    for line in text.splitlines(keepends=True):
        yield at, line
        at += len(line)


def _cells(line: str, at: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Text and place of every cell of a line of a table."""
    for found in re.finditer(r"(?<=\|)([^|\n]*)(?=\|)", line):
        cell = found[1].strip()
        start = at + found.start() + (len(found[1]) - len(found[1].lstrip()) if cell else 1)
        yield cell, (start, start + len(cell))


def _values(checkout: Checkout, source: Any) -> list[float]:
    """Values of a source; a list is an arithmetic sign and two sources, value by value."""
    if isinstance(source, int | float):
        return [float(source)]
    if isinstance(source, list):
        sign, *both = source
        first, second = (_values(checkout, one) for one in both)
        count = max(len(first), len(second))
        first, second = (one * count if len(one) == 1 else one for one in (first, second))
        return [SIGNS[sign](a, b) for a, b in zip(first, second, strict=True)]
    place, _, asked = source.partition("?")
    if place == "code":
        module, _, name = asked.partition(":")
        return [float(getattr(importlib.import_module(module), name))]
    if place == "call":
        name, *given = asked.split()
        return CALLS[name](checkout, *given)
    where, _, column = asked.rpartition("#")
    if place.endswith(".csv"):
        return _of_csv(checkout.root / "leaderboards/published" / place, where, column)
    return _of_json(checkout.root / place, where, column)


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
    return [float(one[key]) for one in kept]


def board(checkout: Checkout, name: str) -> pd.DataFrame:
    """A published board by (budget, method)."""
    frame = _csv(checkout.root / f"leaderboards/published/{name}.csv")
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


def boards(checkout: Checkout, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of means: board, method, and a cell for each budget, empty where the board has not got it."""
    name, method = row[0].strip("`"), row[1].strip("`*")
    published = board(checkout, name)
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


def phases(checkout: Checkout, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of the table of seconds by phase, of the board `serving` at 8,192 tokens; 0 below a hundredth."""
    served = _csv(checkout.root / "leaderboards/published/serving.csv")
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


def claims(checkout: Checkout, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of boards of equal methods: the share with any wrong claim, by rule."""
    from tests.null import BOARDS, RULES

    kept = _kept(checkout.root / NULL, f"claims {row[0].strip('`')}, {row[2]}")
    shape = BOARDS[row[0].strip("`")]
    size = f"{shape.methods} x {shape.budgets} x {shape.tasks}"
    return [row[0], size, row[2], *(f"{kept[f'{rule}_percent']:.1f}" for rule in RULES)]


def least_seen(checkout: Checkout, head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row of the differences that boards say they see, and of how often they are found in score and NLL."""
    kept = _kept(checkout.root / NULL, f"seen {row[0].strip('`')}, 0.05")
    often = (", ".join(f"{share:.0f}" for share in kept[f"{rule}_percent"]) for rule in ("holm", "new"))
    return [row[0], f"{kept['points']:.1f}", f"{kept['nats']:.3f}", *often]


CELLS: dict[str, Callable[[Checkout, Sequence[str], Sequence[str]], list[str]]] = {
    "boards": boards,
    "phases": phases,
    "claims": claims,
    "least_seen": least_seen,
}


def full_cache(checkout: Checkout, name: str) -> list[float]:
    """Mean and half of the interval of the full cache's score on a board, in points."""
    full = board(checkout, name).loc["full", "fullkv"]
    return [full.score_points_mean, (full.score_points_high - full.score_points_low) / 2]


def next_means(checkout: Checkout, budget: str) -> list[float]:
    """The lowest and the highest of the three means of `baselines` that follow CompilerKV's at a budget."""
    means = board(checkout, "baselines").loc[budget].score_points_mean.drop("compilerkv").nlargest(3)
    return [means.min(), means.max()]


def search(checkout: Checkout) -> list[float]:
    """Trials and prompts of `harness tune`, the same in every packaged artefact."""
    kept = [json.loads(path.read_text()) for path in (checkout.root / "methods/tuned/chosen").glob("*/*.json")]
    ((trials, prompts),) = {(len(one["trials"]), len(one["prompts"])) for one in kept}
    return [trials, prompts]


def preset(checkout: Checkout, label: str, parameter: str) -> list[float]:
    from methods.registry import make_policy

    return [float(getattr(make_policy(label), parameter))]


def _new_claims(checkout: Checkout, kind: str) -> list[float]:
    results = json.loads((checkout.root / NULL).read_text(encoding="utf-8"))["results"]
    return [one["new_percent"] for name, one in results.items() if name.startswith("claims ") and f", {kind}," in name]


def mean_claims(checkout: Checkout, kind: str) -> list[float]:
    """Mean over the pretend boards of a kind of the percentage that the new rule makes a wrong claim on."""
    found = _new_claims(checkout, kind)
    return [sum(found) / len(found)]


def claims_range(checkout: Checkout, kind: str) -> list[float]:
    """The least and the greatest of the same."""
    found = _new_claims(checkout, kind)
    return [min(found), max(found)]


def passes(checkout: Checkout, share: str) -> list[float]:
    """The chance that a rule with that share of false claims passes the suite's simulation, binomially."""
    from scipy.stats import binom

    from tests.leaderboards.stats.test_null import COUNT, MOST

    return [float(binom.cdf(MOST, COUNT, float(share)))]


def peaks_as_predicted(checkout: Checkout) -> list[float]:
    """Cells of the board `serving` whose peak is within `ALARM` of its prediction, and all of them."""
    alarm = _csv(checkout.root / "leaderboards/published/serving.csv").alarm
    return [float((~alarm.astype(bool)).sum()), float(len(alarm))]


def faults(checkout: Checkout) -> list[float]:
    """Runs that were disturbed, what was killed in all, and of it workers, nodes and drivers."""
    results = json.loads((checkout.root / "docs/measured/faults.json").read_text(encoding="utf-8"))["results"]
    if wrong := [name for name, one in results.items() if one["wrong"]]:
        raise FigureError(f"faults.json has runs that came out wrong: {wrong}; the page says that none did")
    struck = Counter(kind for one in results.values() for kind in one["struck"])
    return [len(results), struck.total(), *(struck[kind] for kind in ("worker", "node", "driver"))]


def importance_spearman(checkout: Checkout) -> list[float]:
    """The least and the greatest Spearman of the packaged slots, by budget, with the importance of heads."""
    from methods.compilerkv.policy import folder_of
    from methods.compilerkv.selection import spearman
    from methods.compilerkv.tables import load_tables

    tables = load_tables(folder_of("smollm2-135m"))
    found = [spearman(tables.budget[i], tables.importance[0]) for i in range(len(tables.manifest.budgets))]
    return [min(found), max(found)]


CALLS: dict[str, Callable[..., list[float]]] = {
    "claims_range": claims_range,
    "faults": faults,
    "full_cache": full_cache,
    "importance_spearman": importance_spearman,
    "mean_claims": mean_claims,
    "next_means": next_means,
    "passes": passes,
    "peaks_as_predicted": peaks_as_predicted,
    "preset": preset,
    "search": search,
}


def mend(checkout: Checkout, drifted: Sequence[Shown]) -> None:
    """Write into the pages what their sources say, from the end of a page to its start."""
    for one in sorted(drifted, key=lambda one: one.span, reverse=True):
        text = checkout.text(one.page)
        start, end = one.span
        (checkout.root / one.page).write_text(text[:start] + one.found + text[end:], encoding="utf-8")


def line(one: Shown) -> str:
    verdict = "ok" if one.ok else "DRIFTED"
    return f"{verdict:8} {one.page}: says {one.said!r}, its source {one.found!r} ({one.source})"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures", description="figures of the pages, and sources")
    parser.add_argument("--mend", action="store_true", help="write what the sources say into the pages")
    asked = parser.parse_args(arguments)
    try:
        checkout = Checkout.read()
        found = shown(checkout)
        print("\n".join(line(one) for one in found))
        drifted = [one for one in found if not one.ok]
        if asked.mend:
            mend(checkout, drifted)
        missing = uncovered(checkout)
    except (FigureError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyError, ValueError) as error:
        print(f"{TABLE} cannot be used: {error!r}; its head explains the entries", file=sys.stderr)
        return 2
    print("\n".join(missing))
    print(f"{len(found)} figures, {len(drifted)} drifted, {len(missing)} numbers without a source")
    return int(bool(drifted or missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
