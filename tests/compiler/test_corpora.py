"""Corpora: what becomes a paragraph, order, checksums, sentences from any place, and what is refused."""

import gzip
import hashlib
import os
import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.compiler.corpora import corpus_of, load_corpus
from harness.errors import HarnessError
from harness.models.assets import asset_folder
from tasks.texts import calibrates

MODULE = '''"""Doc."""
raise RuntimeError("an asset is never run")
bible = Bible(Version.KING_JAMES, """
In the beginning [was] the word ( so it is said). And he said, [It is] good.
GENESIS
So he died, [being] old and full of days.Blessed [is] the man that walketh.
 The end of the matter is this.(He [was] wise in all his ways.)
""", {Book.GENESIS: "short"})
'''


ORDER = ("first", "second", "third", "last")


def text(paragraphs: int, name: str = "a") -> str:
    """Paragraphs of four sentences, 40 words in all."""
    return "\n\n".join(
        " ".join(f"Here goes {name} the {p}th part with its {s} sentence." for s in ORDER) for p in range(paragraphs)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, the first by name packed, each with a heading."""
    home = tmp_path / "prose"
    home.mkdir()
    (home / "b.txt").write_text(f"{text(60, 'b')}\n\nCHAPTER TWO", encoding="utf-8-sig")
    packed = gzip.compress(f"CHAPTER ONE\r\n\r\nA line\r\nbroken in two.\n\n{text(60)}".encode())
    (home / "a.txt.gz").write_bytes(packed)
    (home / "notes.md").write_text(text(9, "no"))
    return home


def test_a_folder_is_read_by_name_without_headings(folder: Path) -> None:
    corpus = load_corpus(str(folder))
    assert corpus.name == "prose"
    assert corpus.paragraphs[0] == "A line broken in two."
    assert corpus.paragraphs[1:] == tuple(f"{text(60)}\n\n{text(60, 'b')}".split("\n\n"))
    assert corpus.sha256 == hashlib.sha256("\n\n".join(corpus.paragraphs).encode()).hexdigest()


def test_kjv_loses_markup_and_headings_and_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = text(70)
    (tmp_path / "plain.py").write_text(MODULE.replace("GENESIS", f"GENESIS\n{prose}", 1))
    monkeypatch.setattr("harness.compiler.corpora.fetch", {"kjv": tmp_path}.__getitem__)
    corpus = load_corpus("kjv")
    assert corpus.name == "kjv"
    assert list(corpus.paragraphs) == [
        "In the beginning was the word (so it is said). And he said, It is good.",
        *prose.split("\n\n"),
        "So he died, being old and full of days.",
        "Blessed is the man that walketh.",
        "The end of the matter is this. (He was wise in all his ways.)",
    ]


def test_essays_get_their_paragraphs_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(f"{number}.txt" for number in range(99) if calibrates(f"essays/{number}.txt"))
    (tmp_path / name).write_text(
        'May 2010What people do is known.\nIt is in version 1.5 of U.S. law.(So most of them say.)"But why?"'
        "He asked me again.[2]Nobody knew the answer." + text(70).replace("\n\n", "")
    )
    monkeypatch.setattr("harness.compiler.corpora.fetch", {"essays": tmp_path}.__getitem__)
    paragraphs = load_corpus("essays").paragraphs
    assert paragraphs[:4] == (
        "What people do is known. It is in version 1.5 of U.S. law.",
        "(So most of them say.)",
        "He asked me again.[2]",
        "Nobody knew the answer.",
    )
    assert paragraphs[4:] == tuple(text(70).split("\n\n"))


def test_help_topics() -> None:
    corpus = load_corpus("pydoc")
    assert corpus.name == "pydoc" and len(corpus.paragraphs) > 100
    assert load_corpus("pydoc") == corpus


def test_unknown_names(tmp_path: Path) -> None:
    known = r" known: kjv, pydoc, essays, awsdocs, or a"
    for name, hint in (("kvj", r"; did you mean 'kjv'\?"), (str(tmp_path / "nothing"), "")):
        with pytest.raises(HarnessError, match=f"^unknown corpus '{name}'{hint}{known}"):
            load_corpus(name)


@pytest.mark.parametrize(
    ("name", "blob", "message"),
    [
        ("a.md", b"", r"has no \*\.txt and no"),
        ("a.txt", text(3).encode(), "has 120 words of prose, 2000 are needed"),
        ("a.txt", b"\xff\xfe", "a.txt is not readable UTF-8 text .*repair it"),
        ("a.txt.gz", b"no", "a.txt.gz is not readable UTF-8 text .*repair it"),
        ("b.txt.gz", gzip.compress(b"x", mtime=0)[:-9], "b.txt.gz is not readable UTF-8 text .*repair it"),
    ],
)
def test_folders_that_do_not_serve(tmp_path: Path, name: str, blob: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(HarnessError, match=message):
        load_corpus(str(tmp_path))


@given(place=st.floats(0, 1))
def test_sentences_go_round_once(place: float) -> None:
    corpus = corpus_of("c", text(60).split("\n\n"))
    whole = "\n\n" + "\n\n".join(corpus.paragraphs)
    pieces = list(corpus.sentences_from(place))
    assert len(pieces) == 240
    turned = "".join(pieces)
    start = (whole + whole).index(turned)
    assert sorted(pieces) == sorted(corpus.sentences_from(0.0))
    at = int(place % 1.0 * corpus.starts[-1]) + 2  # in `whole`
    first = start + len(pieces[0]) - len(pieces[0].lstrip())
    assert first % len(whole) == 2 or 0 <= first - at < 100


def real(name: str) -> tuple[str, ...]:
    if not asset_folder(name).is_dir():
        pytest.skip(f"{name} is not in the cache; run `harness fetch {name}`")
    paragraphs = load_corpus(name).paragraphs
    assert all(len(paragraph.split()) >= 4 for paragraph in paragraphs)
    return paragraphs


def test_real_kjv() -> None:
    paragraphs = real("kjv")
    assert len(paragraphs) == 4609
    assert paragraphs[0].startswith("In the beginning God created the heaven and the earth. And the earth")
    joined = "\n".join(paragraphs)
    assert joined.count("full of days.\nBlessed is the man") == 1 and not re.search(r"[][<>{}\t\d]", joined)


def test_real_essays() -> None:
    paragraphs = real("essays")
    words = " ".join(paragraphs).split()
    assert len(paragraphs) > 400
    assert sum("." in word.strip('.,;:!?"()')[2:-2] for word in words) < 0.002 * len(words)  # glued together


def test_real_novels(shared_data: Path) -> None:
    corpus = load_corpus(os.fspath(shared_data / "prose"))
    assert len(corpus.paragraphs) > 10_000
    assert next(islice(corpus.sentences_from(0.0), 0, 1)).startswith("\n\nEmma Woodhouse, handsome, clever, and rich")
