"""Generated tasks: they fit, repeat, score themselves, and never show their answer."""

import ast
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import stdlib
from tasks.base import TaskError, TaskOptions, rng
from tasks.stdlib import NextLine, PassageRetrieval
from tests.task_data import Words, tokens

TASKS = (NextLine(), PassageRetrieval())
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)


def options(**changes: Any) -> TaskOptions:
    return replace(
        TaskOptions(tokenizer=Words(), max_tokens=100_000, lengths=(600, 1500), limit=4, contexts="protocol"),
        **changes,
    )


@every_task
def test_samples_fit_their_length_closely(task: stdlib.Generated) -> None:
    opts = options()
    samples = list(task.samples(opts))
    assert [s.id for s in samples] == [f"{length}/{i}" for length in (600, 1500) for i in range(4)]
    for sample in samples:
        length = sample.meta["length"]
        # what is left is less than the shortest paragraph or one line of code, which may be followed by blank ones
        assert length - 60 <= tokens(sample, opts.tokenizer) + sample.max_new_tokens + (not sample.chat) <= length
        assert task.score(sample, sample.answers[0])["score"] == 1.0


@every_task
def test_lengths_that_cannot_be_filled_are_refused(task: stdlib.Generated, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: getattr(stdlib, name)()[:9] for name in ("source_files", "paragraphs")}
    monkeypatch.setattr(stdlib, "source_files", lambda: few["source_files"])
    monkeypatch.setattr(stdlib, "paragraphs", lambda: few["paragraphs"])
    with pytest.raises(TaskError, match=r"nothing fits a length of 50 tokens; ask for a longer one"):
        next(task.samples(options(lengths=(50,))))
    with pytest.raises(TaskError, match=r"ask for a shorter length"):
        next(task.samples(options(lengths=(10**8,), max_tokens=10**9)))


@every_task
def test_provenance_names_the_interpreter_and_what_was_read(task: stdlib.Generated) -> None:
    said = task.provenance(options())
    assert said["python"] == f"{platform.python_implementation()} {platform.python_version()}"
    assert said["sha256"] == hashlib.sha256("\0".join(task.corpus()).encode(errors="surrogatepass")).hexdigest()


def test_next_line_is_the_line_after_the_window_and_not_in_it() -> None:
    for sample in NextLine().samples(options(limit=8)):
        path = next(path for path in stdlib.source_files() if path.name == sample.meta["file"])
        lines = path.read_text(encoding="utf-8").split("\n")
        at = sample.meta["line"] - 1
        (answer,) = sample.answers
        assert answer == lines[at].rstrip()
        assert (sample.context + sample.question).endswith("\n" + "\n".join(lines[at - 9 : at]))
        assert sample.question.count("\n") == stdlib.CODE_TAIL
        assert NextLine().reference(sample) == f"\n{answer}"
        assert answer.strip() not in sample.context + sample.question
        assert len(answer.strip()) >= 12
        assert not sample.chat


def test_a_window_may_reach_into_other_files_but_starts_at_a_line() -> None:
    path = stdlib.source_files()[0]
    draws = rng(1, "window")
    window = stdlib.widest_window(["x = 1", "y = 2"], path, draws=draws, fits=lambda text: text.count("\n") < 30)
    assert window is not None
    assert window.endswith(f"\n# {path.name}\nx = 1\ny = 2")
    assert window.count("\n") == 29


def test_predictable_lines_leave_out_comments_and_texts(tmp_path: Path) -> None:
    filler = "\n".join(f"first_{i} = {i}" for i in range(40))
    code = [
        "# a comment that is long enough",
        "def function(argument):",
        '    """One line of documentation."""',
        "    value = compute(argument)",
        '    text = """several lines of',
        "    a text that is not code",
        '    end"""',
        "    return 1",
        "    link = 'http://example.com'",
        "",
        "    after_a_blank_line()",
        "    'a text standing alone'",
        "    return value + text",
    ]
    path = tmp_path / "made.py"
    path.write_text(f"{filler}\n" + "\n".join(code) + "\n")
    chosen = [path.read_text().split("\n")[i].strip() for i in stdlib.predictable_lines(path)]
    assert chosen == ["def function(argument):", "value = compute(argument)", "return value + text"]


def test_sources_parse_and_hold_no_build_data() -> None:
    files = stdlib.source_files()
    assert {"argparse.py", "json"} & {path.name for path in files} == {"argparse.py"}
    assert [path.name for path in files] == sorted(path.name for path in files)
    assert not [path for path in files if path.name.startswith("_sysconfigdata") or path.name == "sitecustomize.py"]
    ast.parse(stdlib.source(files[-1]))


def test_a_sentence_is_in_its_own_paragraph_alone() -> None:
    for sample in PassageRetrieval().samples(options(limit=8)):
        sentence = sample.question.split("\n")[3]
        blocks = sample.context.split("\n\n")[1:]
        holding = [block for block in blocks if sentence in block]
        assert len(blocks) == sample.meta["paragraphs"] == len(set(blocks))
        (block,) = holding
        assert block.startswith(f"{sample.answers[0]}: ") and len(block) > len(sentence) + 20
        assert [block.split(":")[0] for block in blocks] == [f"Paragraph {i + 1}" for i in range(len(blocks))]


def test_the_paragraph_asked_for_is_anywhere() -> None:
    samples = PassageRetrieval().samples(options(lengths=(1500,), limit=30))
    places = [sample.meta["paragraph"] / sample.meta["paragraphs"] for sample in samples]
    assert min(places) < 0.3 and max(places) > 0.7


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(0, 200))
def test_fill_never_overruns_and_leaves_nothing_that_fits(sizes: list[int], room: int) -> None:
    others = [f"{i}:" + "x" * size for i, size in enumerate(sizes)]

    def left(chosen: Sequence[str]) -> int:
        return room - sum(len(text) for text in chosen)

    def cost(text: str) -> int:
        return 0 if text.startswith("\n\n") else len(text)

    chosen = stdlib.fill("", others, left=left, cost=cost)
    assert chosen[0] == ""
    assert left(chosen) >= 0
    assert all(len(text) > left(chosen) for text in others if text not in chosen)
