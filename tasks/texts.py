"""Free text that packages ship, as named documents: what contexts are drawn from, and a quarter for calibration.

essays      49 essays by Paul Graham (`tasks.essays`)
awsdocs     what the wheel botocore says of AWS services in its JSON, in sections of 8,000 words

What services say twice is taken once. A hash of its name puts every fourth document aside for calibration
(`harness.compiler.corpora`); the others are the pool (`tasks.pool`). The King James Bible is calibration's alone: the
packaged tables were compiled from all of it. Python's help topics are `stdlib/passage_retrieval`'s own.
"""

import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from tasks.base import TaskError, TaskOptions
from tasks.datafile import read_text
from tasks.essays import essay_files

SECTION = 8000  # words of the services in a document
ASIDE = 4  # every so many-th document is for calibration
TWICE = 0.15  # share of a paragraph's runs of `RUN` words that earlier ones have, from which it is left out
RUN = 8
SENTENCE_END = re.compile(r"""[.!?]["')”’]*$""")
BLOCK = re.compile(r"</?(?:p|li|ul|ol|note|br|dl|dd|dt|important|h\d)\b[^>]*>")
DATED = re.compile(r"-\d{4}-\d\d-\d\d-")
TAG = re.compile(r"<[^>]+>")
LEAST_WORDS = 20  # of a paragraph of documentation: shorter ones are labels


@dataclass(frozen=True)
class Document:
    """One text of the pool. paragraphs: joined by a space they are the text."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def calibrates(self) -> bool:
        """Whether it is put aside for calibration."""
        return calibrates(self.name)

    @cached_property
    def text(self) -> str:
        return " ".join(self.paragraphs)


def sha256(text: str) -> str:
    """Return the hash of a text, which orders and parts documents."""
    return hashlib.sha256(text.encode()).hexdigest()


def share_of(name: str, shares: int) -> int:
    """Return which of so many shares a name belongs to, by its hash."""
    return int(sha256(name), 16) % shares


def calibrates(name: str) -> bool:
    """Return whether the document of this name is put aside for calibration."""
    return share_of(name, ASIDE) == 0


@lru_cache(maxsize=2)
def documentation(folder: Path) -> tuple[Document, ...]:
    """Return the services' documentation of the `awsdocs` asset in sections, services by name, the newest of each.

    A service is a JSON file, compressed; every string under a key `documentation` is taken, in the file's order, its
    blocks apart and without its tags: those of `LEAST_WORDS` words that end as a sentence does, none of them twice.
    Raises TaskError when the folder has no such file.
    """
    newest = {DATED.split(path.name)[0]: path for path in sorted(folder.glob("*.json.gz"))}
    if not newest:
        raise TaskError(f"no files *.json.gz in {folder}; run `harness fetch awsdocs`")
    models = (json.loads(gzip.decompress(newest[name].read_bytes())) for name in sorted(newest))
    return _sections(once([block for model in models for block in _blocks(model)]))


def essays(options: TaskOptions) -> tuple[Document, ...]:
    """Return the essays of the `essays` asset, by file name. Raises TaskError when there is none."""
    texts = ((path.name, " ".join(read_text(path).split())) for path in essay_files(options))
    found = tuple(Document(f"essays/{name}", (text,)) for name, text in texts if text)
    if not found:
        raise TaskError(f"no essays in {options.asset('essays')}; run `harness fetch essays`")
    return found


def once(paragraphs: Sequence[str]) -> list[str]:
    """Return those paragraphs of which no more than `TWICE` was said before, in runs of `RUN` words."""
    seen: set[int] = set()
    kept = []
    for paragraph in paragraphs:
        words = paragraph.split()
        runs = {hash(tuple(words[at : at + RUN])) for at in range(len(words) - RUN + 1)}
        if not runs or len(runs & seen) <= TWICE * len(runs):
            kept.append(paragraph)
            seen |= runs
    return kept


def _sections(prose: Sequence[str]) -> tuple[Document, ...]:
    """Paragraphs as documents of `SECTION` words, the last one shorter."""
    ends = accumulate(len(paragraph.split()) for paragraph in prose)
    parts = groupby(zip(prose, ends, strict=True), key=lambda paragraph: (paragraph[1] - 1) // SECTION)
    return tuple(Document(f"awsdocs-{part:03}", tuple(text for text, _ in found)) for part, found in parts)


def _blocks(model: Any) -> Iterator[str]:
    """The blocks of prose of every `documentation` in a service's model."""
    if isinstance(model, list):
        for item in model:
            yield from _blocks(item)
    elif isinstance(model, dict):
        for key, value in model.items():
            if key == "documentation" and isinstance(value, str):
                plain = (" ".join(html.unescape(TAG.sub("", block)).split()) for block in BLOCK.split(value))
                yield from (text for text in plain if SENTENCE_END.search(text) and len(text.split()) >= LEAST_WORDS)
            else:
                yield from _blocks(value)
