"""Free text as documents: what each reader takes and leaves, what is said twice, and the part that calibrates."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from harness.compiler.corpora import CORPORA, load_corpus
from harness.models.assets import asset_folder
from harness.plan.datasets import find_asset
from tasks import texts
from tasks.base import TaskError, TaskOptions
from tasks.pool import read_pool
from tests.task_data import Words


def said(name: str) -> str:
    """A block of documentation that no other shares a run of words with."""
    words = " ".join(f"{name}{number}" for number in range(18))
    return f"<p>{name} <i>is</i> this &amp; that: {words}.</p>"


def test_documentation_is_the_newest_of_each_service_without_tags_labels_or_repeats(tmp_path: Path) -> None:
    def write(name: str, first: str, *others: str) -> None:
        shapes = [{"documentation": text} for text in others]
        model = {"operations": {"A": {"documentation": first}}, "shapes": shapes}
        (tmp_path / f"{name}-service-2.json.gz").write_bytes(gzip.compress(json.dumps(model).encode()))

    write("ec2-2015-01-01", said("Old"))
    write("ec2-2016-11-15", said("Run") + "<p>Too short.</p>" + said("Stop"), said("Run"))
    write("acm-2015-12-08", said("Ask"), said("Never ends").replace(".<", "<"))
    (section,) = texts.documentation(tmp_path)
    assert [paragraph.split()[0] for paragraph in section.paragraphs] == ["Ask", "Run", "Stop"]
    assert section.text.startswith("Ask is this & that: Ask0 Ask1")


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="run `harness fetch awsdocs`"):
        texts.documentation(tmp_path)


def test_sections_keep_every_paragraph_in_order(tmp_path: Path) -> None:
    model = [{"documentation": unlike(number)} for number in range(50)]
    (tmp_path / "a-2016-11-15-service-2.json.gz").write_bytes(gzip.compress(json.dumps(model).encode()))
    sections = texts.documentation(tmp_path)
    assert [text for section in sections for text in section.paragraphs] == [unlike(number) for number in range(50)]
    assert all(7_600 < len(section.text.split()) <= 8_400 for section in sections[:-1]) and len(sections) == 3


def unlike(number: int) -> str:
    """A paragraph of 402 words that no other shares a run of words with."""
    return " ".join([*(f"w{number}x{at}" for at in range(401)), "ends."])


def real(name: str) -> None:
    if not asset_folder(name).is_dir():
        pytest.skip(f"{name} is not in the cache; run `harness fetch {name}`")


def test_what_calibrates_is_in_no_pool() -> None:
    for name in ("essays", "awsdocs", "kjv"):
        real(name)
    pool = read_pool(TaskOptions(tokenizer=Words(), max_tokens=1, fetch=find_asset))
    kinds = Counter(document.name[:3] for document in pool)
    assert kinds["ess"] == 30 and kinds["aws"] > 150 and len(kinds) == 2
    assert not any(document.calibrates for document in pool)
    evaluated = {run for document in pool for run in runs(document.text)}
    for name in sorted(CORPORA.keys() - {"pydoc"}):
        own = [run for paragraph in load_corpus(name).paragraphs for run in runs(paragraph)]
        assert len(own) > 10_000
        assert sum(run in evaluated for run in own) < 0.02 * len(own)  # what two documents say alike


def runs(text: str) -> set[int]:
    words = text.split()
    return {hash(tuple(words[at : at + 8])) for at in range(len(words) - 7)}
