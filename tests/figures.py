"""Figures of the pages against what they come from: `python -m tests.figures [--mend]`, or `make figures`.

`docs/figures.toml` says where each number of README.md and docs/ comes from; its head explains the entries. A line is
printed for each figure: page, what the page says, what its source says, verdict. The command ends with 1 when one of
them has drifted, or a page has a number that no entry covers. `--mend` writes what the sources say into the pages; what
a sentence claims of a number is for a person to read again.

Published CSV files count as sources because they follow from `leaderboards/published/records` to the byte
(`tests/boards/test_sources.py`).
"""

import argparse
import re
import sys
import tomllib
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.figure_sources import CELLS, FigureError, values

ROOT = Path(__file__).resolve().parent.parent
TABLE = "docs/figures.toml"
PAGES = r"README\.md|docs/(?!method-reference|architectures|claims)[^/]*\.md"
"""Whose numbers all need an entry; those pages are made and held by their own tests."""
NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
STANDING = re.compile(r"(?<![\w.,])(?<!\w-)(?:\d(?:[\d,]*\d)?(?:\.\d+)*|\.\d+)")
"""A number that is no part of a name, such as int8, Qwen2.5 or SmolLM2-135M."""
NOT_READ = re.compile(
    r"^```.*?^```|`(?:[^`\n]|\n(?!\n))*`|\]\([^)\s]*(?:\s+\"[^\"]*\")?\)|https?://\S+|^[1-9]\. ", re.M | re.S
)  # code, targets of links, the numbers of a list


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
            match = _match(text, entry)
            yield from (match.span(i) for i in range(1, len(match.groups()) + 1))
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
    found_of = [(source, value) for source in entry["from"] for value in values(checkout.root, source)]
    if len(found_of) != len(match.groups()):
        raise FigureError(
            f"{entry['page']}: {entry['says']!r} has {len(match.groups())} numbers, its sources {len(found_of)}; "
            f"give one value for each in {TABLE}"
        )
    for i, (source, value) in enumerate(found_of, start=1):
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
        for (said, span), found in zip(row, expected_of(checkout.root, [cell for cell, _ in head], texts), strict=True):
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
