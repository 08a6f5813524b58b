"""The frontier on a page: the folders of `harness boundary` beside the runs, as pictures with their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.records.boundary_folder import MANIFEST_FILE, BoundaryManifest, BoundaryRecord, load_boundaries
from leaderboards.pages.html import element, frame_table, text
from leaderboards.pages.svg import adopted
from leaderboards.tables import memory

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
    title, about = memory.title(manifest), memory.describe(records)
    drawn, _ = memory.draw(records, manifest, salt=salt)
    picture = adopted(drawn, salt=salt, title=title, about=about, points={})
    troubles = [line for record in memory.ordered(records) for line in memory.troubles(record)]
    lines = "".join(f"<li>{text(line, longest=600)}</li>" for line in [*memory.facts(manifest), *troubles])
    region = {"class": "scroll", "role": "region", "aria-label": title, "tabindex": "0"}
    return (
        f"<figure>{element('h3', text(title), {})}{element('div', picture, region)}"
        f"<figcaption>{text(memory.READING.replace('`', ''), longest=600)}</figcaption>"
        f'<details><summary>Values</summary><div class="scroll">{frame_table(memory.frame(records), title)}</div>'
        f'</details></figure><ul class="facts">{lines}</ul>'
    )
