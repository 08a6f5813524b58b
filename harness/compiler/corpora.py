"""Prose that calibration prompts are made from: a name or a folder in, paragraphs and a checksum out.

kjv             the King James Bible, an asset (harness.models.assets) in the public domain
pydoc           the running Python's help topics; they differ by version
essays          the essays asset
awsdocs         the documentation of AWS services, an asset
path/to/folder  its *.txt and *.txt.gz in UTF-8, by name; paragraphs are parted by blank lines

No drawn context of an evaluation has text of these four: calibration has the Bible for itself, every fourth essay and
section of the services (`tasks.texts`), and half of the topics' paragraphs.

A paragraph is one line of prose. Headings, tables and other lines that do not end as a sentence does are left out.
"""

import ast
import gzip
import hashlib
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import accumulate, chain
from pathlib import Path

import punkt

from harness.errors import HarnessError, did_you_mean, shown
from harness.models.assets import fetch
from harness.records.paths import path_of
from harness.records.plain_files import MOST_BYTES, read_plain
from tasks.base import TaskError
from tasks.stdlib import help_paragraphs
from tasks.texts import Document, calibrates, documentation

MIN_WORDS = 2000
"""Words of the smallest corpus: a few prompts of 600 tokens without an overlap."""
LEAST_PROSE = 4
"""Words of the shortest paragraph."""
SENTENCE_END = re.compile(r"""[.!?]["')”’]*(?:\[\d+\])?$""")

BLANK_LINE = re.compile(r"\n\s*\n")
# The essays have lost their line breaks between paragraphs: `... wrong.We had ...`, `... done.)"What ...`.
GLUED = re.compile(
    r'(?<=[a-z0-9%][.?!])(?=["(“]?[A-Z])|(?<=[.?!][")\]”])(?=["(“]?[A-Z])|(?<=[.?!]\[\d\])(?=["(“]?[A-Z])'
    r"|(?<=[a-z] (?:19|20)\d\d)(?=[(A-Z])"
)


@dataclass(frozen=True)
class Corpus:
    """Named prose. sha256: of the paragraphs in UTF-8, joined by a blank line."""

    name: str
    paragraphs: tuple[str, ...]
    sha256: str

    @cached_property
    def starts(self) -> list[int]:
        """Character where each paragraph starts in the joined text, and where one after the last would."""
        return [0, *accumulate(len(paragraph) + 2 for paragraph in self.paragraphs)]

    def sentences_from(self, place: float) -> Iterator[str]:
        """Yield every sentence once, each after the white space before it (a blank or a blank line), round the corpus.

        The first one is the first that starts at `place` (in [0, 1) of the characters) or after it. Joined in order
        they are the text again.
        """
        at = int(place % 1.0 * self.starts[-1])
        first = bisect_right(self.starts, at) - 1
        pieces = _pieces(self.paragraphs[first])
        skipped = sum(start < at - self.starts[first] for start, _ in _sentences(self.paragraphs[first]))
        others = map(_pieces, (*self.paragraphs[first + 1 :], *self.paragraphs[:first]))
        yield from chain(pieces[skipped:], chain.from_iterable(others), pieces[:skipped])


def corpus_of(name: str, paragraphs: Iterable[str]) -> Corpus:
    """Return a corpus of these paragraphs. Raises HarnessError when they have fewer than `MIN_WORDS` words."""
    kept = tuple(paragraphs)
    words = sum(len(paragraph.split()) for paragraph in kept)
    if words < MIN_WORDS:
        raise HarnessError(
            f"corpus {shown(name)} has {words} words of prose, {MIN_WORDS} are needed; give it more text"
        )
    text = "\n\n".join(kept)
    return Corpus(name, kept, hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest())


def load_corpus(name: str) -> Corpus:
    """Return the corpus of this name, or of the folder at this path. Its name is then the folder's.

    Raises HarnessError: unknown name, a folder without readable text, too little prose, an asset that cannot be had.
    """
    if name in CORPORA:
        return corpus_of(name, CORPORA[name]())
    check_corpus(name)
    folder = path_of(name)
    return corpus_of(folder.resolve().name, _folder(folder))


def check_corpus(name: str) -> None:
    """Raise HarnessError for a name that is none, nor a folder; touches no network."""
    if name not in CORPORA and not path_of(name).is_dir():
        hint, known = did_you_mean(name, CORPORA), ", ".join(CORPORA)
        raise HarnessError(f"unknown corpus {shown(name)}{hint} known: {known}, or a folder with *.txt or *.txt.gz")


@lru_cache(maxsize=4096)
def _sentences(paragraph: str) -> tuple[tuple[int, int], ...]:
    return tuple(punkt.tokenizer_for("english").span_tokenize(paragraph))


def _pieces(paragraph: str) -> list[str]:
    """Sentences with the white space before them; the first of a paragraph comes after a blank line."""
    spans = _sentences(paragraph)
    befores = [0, *(end for _, end in spans)]
    pieces = [paragraph[before:end] for before, (_, end) in zip(befores, spans, strict=False)]
    return [f"\n\n{pieces[0]}", *pieces[1:]]


def _prose(blocks: Iterable[str]) -> list[str]:
    """Those blocks that are prose, each on one line."""
    lines = (" ".join(block.split()) for block in blocks)
    return [line for line in lines if SENTENCE_END.search(line) and len(line.split()) >= LEAST_PROSE]


def _folder(folder: Path) -> list[str]:
    files = sorted((*folder.glob("*.txt"), *folder.glob("*.txt.gz")), key=lambda path: path.name)
    if not files:
        raise HarnessError(f"corpus folder {folder} has no *.txt and no *.txt.gz; put some there, or name another one")
    return [paragraph for path in files for paragraph in _prose(BLANK_LINE.split(_read(path)))]


def _read(path: Path) -> str:
    blob = read_plain(path, remedy="repair it or take it away")
    try:
        if path.suffix == ".gz":
            with gzip.open(BytesIO(blob)) as packed:
                blob = packed.read(MOST_BYTES + 1)
        if len(blob) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        return blob.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        why = f"{path} is not readable UTF-8 text ({error})"
        raise HarnessError(f"{why}; repair it or take it away") from None


def _kjv() -> list[str]:
    """The longest string literal of `plain_text_readers_bible.py`, its text without verse numbers.

    The module, an asset whose checksum was checked, is parsed and never run. Brackets mark words that the translators
    added; only the marks are dropped. One missing line break between two books is put back.
    """
    (path,) = fetch("kjv").iterdir()
    nodes = ast.walk(ast.parse(_read(path)))
    literals = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    text = re.sub(r"[\[\]]", "", max(literals, key=len)).replace("( ", "(").replace(".(", ". (")
    return _prose(re.split(r"\n|(?<=[a-z]\.)(?=[A-Z])", text))


def _apart(documents: Iterable[Document]) -> list[str]:
    """The paragraphs of the documents that no evaluation draws from."""
    return [paragraph for document in documents if document.calibrates for paragraph in document.paragraphs]


def _essays() -> list[str]:
    files = (path for path in sorted(fetch("essays").glob("*.txt")) if calibrates(f"essays/{path.name}"))
    return [paragraph for text in map(_read, files) for paragraph in _prose(GLUED.split(text))]


def _pydoc() -> Sequence[str]:
    try:
        return help_paragraphs(calibration=True)
    except TaskError as error:
        raise HarnessError(f"corpus 'pydoc': {error}") from None


CORPORA: dict[str, Callable[[], Sequence[str]]] = {
    "kjv": _kjv,
    "pydoc": _pydoc,
    "essays": _essays,
    "awsdocs": lambda: _apart(documentation(fetch("awsdocs"))),
}
