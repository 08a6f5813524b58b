"""The frontier on a page: the folders of `harness boundary` beside the runs, as pictures with their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.boundary_store import MANIFEST_FILE, BoundaryManifest, BoundaryRecord, load_boundaries
from leaderboards import frontier
from leaderboards.page_svg import adopted
from leaderboards.page_text import element, frame_table, text

Search = tuple[BoundaryManifest, Sequence[BoundaryRecord]]


def find_searches(roots: Iterable[Path]) -> list[Search]:
    """The searches of each root that is a folder of `harness boundary`, or of the folders in it, in name order.

    A folder without a finished probe is left out. Raises HarnessError when a file of one is damaged.
    """
    folders: dict[Path, None] = {}
    for root in map(Path, roots):
        own = (root / MANIFEST_FILE).is_file()
        found = [root] if own else sorted(path.parent for path in root.glob(f"*/{MANIFEST_FILE}"))
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    loaded = [load_boundaries(folder) for folder in folders]
    return [(manifest, records) for manifest, records in loaded if records]


def frontiers(searches: Sequence[Search]) -> str:
    """A picture, its values, and what decides them, for each folder of searches; nothing without any."""
    return "".join(_frontier(*search, salt=f"frontier-{i}") for i, search in enumerate(searches))


def _frontier(manifest: BoundaryManifest, records: Sequence[BoundaryRecord], *, salt: str) -> str:
    title, about = frontier.title(manifest), frontier.describe(records)
    drawn, _ = frontier.draw(records, manifest, salt=salt)
    picture = adopted(drawn, salt=salt, title=title, about=about, points={})
    troubles = [line for record in frontier.ordered(records) for line in frontier.troubles(record)]
    lines = "".join(f"<li>{text(line, longest=600)}</li>" for line in [*frontier.facts(manifest), *troubles])
    region = {"class": "scroll", "role": "region", "aria-label": title, "tabindex": "0"}
    return (
        f"<figure>{element('h3', text(title), {})}{element('div', picture, region)}"
        f"<figcaption>{text(frontier.READING.replace('`', ''), longest=600)}</figcaption>"
        f'<details><summary>Values</summary><div class="scroll">{frame_table(frontier.frame(records), title)}</div>'
        f'</details></figure><ul class="facts">{lines}</ul>'
    )
