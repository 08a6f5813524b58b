"""The memory boundary on a page: the folders of `harness boundary` beside the runs, as pictures with their values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from harness.records.boundary_folder import MANIFEST_FILE, BoundaryManifest, BoundaryRecord, load_boundaries
from leaderboards.pages.html import TextTable
from leaderboards.pages.svg import adopted
from leaderboards.tables import boundary

Search = tuple[BoundaryManifest, Sequence[BoundaryRecord]]


@dataclass(frozen=True)
class BoundaryPicture:
    """One folder of searches: the picture as an element, how to read it, its values, and what decides them."""

    title: str
    svg: Markup
    reading: str
    values: TextTable
    facts: Sequence[str]


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


def boundary_pictures(searches: Sequence[Search]) -> list[BoundaryPicture]:
    """One for each folder of searches; their elements share no id."""
    return [_picture(*search, salt=f"frontier-{i}") for i, search in enumerate(searches)]


def _picture(manifest: BoundaryManifest, records: Sequence[BoundaryRecord], *, salt: str) -> BoundaryPicture:
    title = boundary.title(manifest)
    drawn, _ = boundary.draw(records, manifest, salt=salt)
    troubles = [line for record in boundary.ordered(records) for line in boundary.troubles(record)]
    return BoundaryPicture(
        title=title,
        svg=adopted(drawn, salt=salt, title=title, about=boundary.describe(records), points={}),
        reading=boundary.READING.replace("`", ""),
        values=TextTable.of(boundary.frame(records), title),
        facts=[*boundary.facts(manifest), *troubles],
    )
