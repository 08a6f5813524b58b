"""Dead links of the Markdown pages: `python -m tests.links [CHECKOUT]` prints a line for each and then ends with 1.

A relative link or image must lead to a file or folder that git tracks, an anchor to a heading, and a file of this
repository that a page names in code style must be there. `LIMITS` says which pages are read and how long they may be.
Nothing is asked of the network, so links to other sites are not followed.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

LIMITS: dict[str, int | None] = {  # patterns of the paths of pages, with the lines that one may have at most
    r"README\.md": 120,
    r"CONTRIBUTING\.md": 120,
    r"docs/(?!method-reference).*\.md": 200,
    r"docs/method-reference\.md": None,  # as long as there are methods
    r"examples/.*\.md": 200,
    r"leaderboards/published/.*\.md": None,  # as long as a board has rows
}
NAMED_FILE = re.compile(r"(?:methods|tasks|harness|leaderboards|tests|docs|examples)/[\w./-]+\.(?:py|toml|md|yaml)")
PLACEHOLDER = "NAME"  # part of a file's name that stands for any: such a file need not be there


@dataclass
class Page:
    """What a Markdown text refers to, and what may be referred to in it."""

    lines: int
    links: list[tuple[int, str]] = field(default_factory=list)  # and images: the line of their block and the target
    files: list[tuple[int, str]] = field(default_factory=list)  # the same of files in code style
    anchors: set[str] = field(default_factory=set)  # of its headings, as GitHub makes them


def read_page(text: str) -> Page:
    page = Page(lines=len(text.splitlines()))
    headings: Counter[str] = Counter()
    line, heading = 1, False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            for part in _parts(token):
                target = part.attrGet("href") or part.attrGet("src")
                if target is not None:
                    page.links.append((line, str(target)))
                elif part.type == "code_inline" and NAMED_FILE.fullmatch(part.content):
                    page.files.append((line, part.content))
            if heading:
                anchor = _anchor("".join(part.content for part in _parts(token)))
                page.anchors.add(f"{anchor}-{headings[anchor]}" if headings[anchor] else anchor)
                headings[anchor] += 1
        heading = token.type == "heading_open"
    return page


def _parts(token: Token) -> Iterator[Token]:
    for part in token.children or ():
        yield part
        yield from _parts(part)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def tracked_files(root: Path) -> set[str]:
    """Paths below `root`, with slashes, of the files that git tracks and of the folders they are in."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    files = {name for name in listed.split("\0") if name}
    return files | {str(folder) for name in files for folder in Path(name).parents}


def problems(root: Path) -> list[str]:
    """What is wrong with the pages of a checkout, a line each: the place, what was found there and what is missing."""
    tracked = tracked_files(root)
    limits = {path: limit for path in sorted(tracked) for name, limit in LIMITS.items() if re.fullmatch(name, path)}
    pages = {path: read_page((root / path).read_text(encoding="utf-8")) for path in limits}
    found = []
    for path, page in pages.items():
        if (limit := limits[path]) is not None and page.lines > limit:
            found.append(f"{path}: {page.lines} lines, at most {limit}; move something to another page")
        found += [f"{path}:{line}: {target}: {wrong}" for line, target, wrong in _dead(path, pages, tracked)]
    return found


def _dead(path: str, pages: dict[str, Page], tracked: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    for line, name in pages[path].files:
        if PLACEHOLDER not in name and name not in tracked:
            yield line, name, "git tracks no such file"
    for line, target in pages[path].links:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        there = normpath(join(dirname(path), unquote(parts.path))) if parts.path else path
        if there not in tracked:
            yield line, target, "git tracks no such file"
        elif parts.fragment and (there not in pages or unquote(parts.fragment) not in pages[there].anchors):
            yield line, target, f"{there} has no such heading"


def main(arguments: Sequence[str]) -> int:
    root = Path(arguments[0] if arguments else ".")
    try:
        found = problems(root)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{root} cannot be checked: {error}; give the folder of a git checkout", file=sys.stderr)
        return 2
    print("\n".join(found) if found else "Every link leads somewhere.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
