"""The essays: reading them, punkt's sentences, and the words that a haystack takes."""

import random
import re
import time
from pathlib import Path

import punkt
import pytest

from tasks.base import TaskError
from tasks.essays import Essays, read_essays
from tests.task_data import Options, write_essays


@pytest.fixture(scope="module")
def real(small: Options, essays_folder: Path) -> Essays:
    return read_essays(small(fetch=lambda _: essays_folder))


def test_short_essays_start_over() -> None:
    essays = Essays(text="One  two.\nThree four five! Six", files=1)
    assert essays.sentences == ["One two.", "Three four five!", "Six"]
    assert essays.starts == [0, 10, 27]
    assert essays.head(4) == ["One two.", "Three four"]
    assert essays.head(5) == ["One two.", "Three four five!"]
    assert " ".join(essays.head(14)) == "One two. Three four five! Six One two. Three four five! Six One two."


def test_an_abbreviation_does_not_end_a_sentence() -> None:
    sentences = ["Mr. Graham spoke to Dr. Smith at 5 p.m. on Monday.", 'He said "No."', "Then he left."]
    assert Essays(text=" ".join(sentences), files=1).sentences == sentences


def test_the_real_essays(real: Essays) -> None:
    assert real.files == 49
    assert len(real.text) == 643_830
    start = time.perf_counter()
    fresh = Essays(real.text, real.files)
    assert len(fresh.sentences) == len(fresh.starts)
    assert time.perf_counter() - start < 5
    words = re.sub(r"\s+", " ", real.text).strip().split(" ")
    assert "".join(real.sentences).replace(" ", "") == "".join(words)
    assert sum(sentence.startswith("[") for sentence in real.sentences) > 100  # punkt ends `good.[2]` after the stop


def test_a_head_is_what_nvidia_splits(real: Essays) -> None:
    """NVIDIA joins the first words by spaces and splits that; here the whole is split once."""
    words = re.sub(r"\s+", " ", real.text).strip().split(" ")
    draw = random.Random(0)
    same = 0
    for count in [draw.randint(20, 30_000) for _ in range(25)]:
        expected = punkt.sent_tokenize(" ".join(words[:count]))
        head = real.head(count)
        assert " ".join(head) == " ".join(expected)
        same += head == expected
    assert same >= 24  # only a last word such as `U.S.` can be cut differently


def test_essays_are_found_nested_directly_and_by_folder_name(options: Options, tmp_path: Path) -> None:
    nested = read_essays(options())
    assert nested.files == 5 and "not an essay" not in nested.text
    write_essays(tmp_path / "flat")
    write_essays(tmp_path / "PaulGrahamEssays")
    for folder in (tmp_path / "flat", tmp_path / "PaulGrahamEssays"):
        assert read_essays(options(fetch=lambda _, folder=folder: folder)) == nested
    assert len(nested.starts) == 300
    assert all(nested.text[start:].startswith("The ") for start in nested.starts)


def test_no_essays(options: Options, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"no essays in {re.escape(str(tmp_path))}"):
        read_essays(options(fetch=lambda _: tmp_path))
    with pytest.raises(TaskError, match="asset 'essays' is needed"):
        read_essays(options(fetch=None))
