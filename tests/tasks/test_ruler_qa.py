"""RULER's question answering: which questions, where their documents stand, and files that are missing or damaged."""

import json
import random
import re
from pathlib import Path

import pytest

from tasks.base import TASKS, TaskError
from tasks.ruler.family import SamplePlan
from tasks.ruler.qa import Documents, Item
from tests.task_data import Options, Words, draw_samples, hotpot, user_message

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def test_a_prompt_in_full() -> None:
    generator = Documents([Item("Who?", ("Ann", "Anna"), own=(1,))], ["It rains.", "Ann\nis here.", "It snows."])
    prompt = generator.build(2, SamplePlan(512, 0, random.Random(0), 0.6))
    other = "It rains." if "rains" in prompt.context else "It snows."
    assert prompt.context + prompt.question + prompt.answer_prefix == (
        f"{ORDER}\n\nThe following are given documents.\n\nDocument 1:\n{other}\n\nDocument 2:\nAnn\nis here.\n\n"
        f"{ORDER}\n\nQuestion: Who? Answer:"
    )
    assert prompt.answers == ("Ann", "Anna")
    assert prompt.meta["depth"] == 100


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents_hold_the_answer(name: str, options: Options) -> None:
    for sample in draw_samples(f"ruler/{name}", options(lengths=(1024,), limit=20)):
        assert sample.context.startswith(f"{ORDER}\n\nThe following are given documents.\n\nDocument 1:\n")
        assert sample.question.startswith(f"{ORDER}\n\nQuestion: W")
        assert sample.answer_prefix == " Answer:"
        texts = re.split(r"\n\nDocument \d+:\n", sample.context)[1:]
        assert len(texts) == len(set(texts)) == sample.meta["documents"]
        holding = [i for i, text in enumerate(texts) if re.search(rf"\b{sample.answers[0]}\b", text)]
        assert len(holding) == 1
        if name == "qa_1":
            assert sample.meta["depth"] == round(100 * holding[0] / (len(texts) - 1))
        else:
            assert texts[holding[0]].startswith("Title ")
        assert "Refused?" not in sample.question


@pytest.mark.parametrize(("name", "needed"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_missing_and_damaged_question_files(name: str, needed: str, options: Options, tmp_path: Path) -> None:
    command = f"run `harness data fetch {needed}"
    with pytest.raises(TaskError, match=f"asset '{needed}' is needed"):
        draw_samples(f"ruler/{name}", options(data_dir=None, fetch=None))
    with pytest.raises(TaskError, match=f"no {'squad' if name == 'qa_1' else 'hotpot'}.* in .*{command} --to"):
        draw_samples(f"ruler/{name}", options(data_dir=tmp_path))
    for text in ("{", "[3]", "{}", '{"data": [{}]}'):
        (tmp_path / "squad.json").write_text(text)
        (tmp_path / "hotpot.json").write_text(text)
        with pytest.raises(TaskError, match=r"is not JSON|is damaged: |holds no answerable question"):
            draw_samples(f"ruler/{name}", options(data_dir=tmp_path))


def test_without_a_data_folder_the_asset_is_read(options: Options, tmp_path: Path) -> None:
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot(random.Random(2))))
    chosen = options(data_dir=None, fetch={"hotpotqa": tmp_path}.__getitem__, lengths=(1024,))
    assert len(draw_samples("ruler/qa_2", chosen)) == 4
    assert TASKS["ruler/qa_2"].provenance(chosen)["file"] == "hotpot_dev_distractor_v1.json"


def test_a_question_that_cannot_fit_is_passed_over_and_later_ones_follow(options: Options, tmp_path: Path) -> None:
    rows = hotpot(random.Random(2), rows=510)
    for unfit in (1, 7, 500):
        rows[unfit]["context"][0][1] = ["word " * 600]
    (tmp_path / "hotpot.json").write_text(json.dumps(rows))
    samples = draw_samples("ruler/qa_2", options(data_dir=tmp_path, lengths=(512,), limit=None))
    items = [sample.meta["item"] for sample in samples]
    assert [sample.id for sample in samples] == [f"512/{item}" for item in items]
    assert sorted(items[:498]) == [i for i in range(500) if i not in (1, 7)]
    assert items[498:] == [501, 502]


def test_a_limit_spreads_over_the_first_500_questions(options: Options, tmp_path: Path) -> None:
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot(random.Random(2), rows=600)))
    for limit in (4, 16):
        chosen = options(data_dir=tmp_path, lengths=(512,), limit=limit)
        items = sorted(sample.meta["item"] for sample in draw_samples("ruler/qa_2", chosen))
        gaps = [b - a for a, b in zip(items, [*items[1:], items[0] + 500], strict=True)]
        assert max(gaps) <= 500 / limit + 2


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_real_questions(name: str, options: Options, shared_data: Path) -> None:
    chosen = options(data_dir=shared_data, lengths=(4096,), limit=10)
    for sample in draw_samples(f"ruler/{name}", chosen):
        assert any(answer in sample.context for answer in sample.answers) or sample.answers[0] in ("yes", "no")
        assert len(Words().encode(user_message(sample))) + 32 <= 4096
    assert len(TASKS[f"ruler/{name}"].provenance(chosen)["sha256"]) == 64
