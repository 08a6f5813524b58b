"""Rows of the hub's SQuAD and HotpotQA in the shapes of the official files, which RULER's tasks read."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any


def squad_json(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows in the shape of SQuAD's file. Articles and paragraphs are runs of rows with one title and context.

    The hub's rows have no plausible answers of unanswerable questions and no paragraphs without a question.
    """
    articles = []
    for title, article in groupby(rows, key=lambda row: row["title"]):
        paragraphs = [
            {"context": context, "qas": [_squad_question(row) for row in paragraph]}
            for context, paragraph in groupby(article, key=lambda row: row["context"])
        ]
        articles.append({"title": title, "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def _squad_question(row: Mapping[str, Any]) -> dict[str, Any]:
    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    answers = [{"text": text, "answer_start": start} for text, start in pairs]
    return {"question": row["question"], "id": row["id"], "answers": answers, "is_impossible": not answers}


def hotpotqa_json(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the shape of HotpotQA's file: paragraphs as [title, sentences], facts as [title, sentence]."""
    same = ("question", "answer", "type", "level")
    return [
        {
            "_id": row["id"],
            **{key: row[key] for key in same},
            "supporting_facts": _pairs(row["supporting_facts"], "title", "sent_id"),
            "context": _pairs(row["context"], "title", "sentences"),
        }
        for row in rows
    ]


def _pairs(columns: Mapping[str, Any], first: str, second: str) -> list[list[Any]]:
    return [list(pair) for pair in zip(columns[first], columns[second], strict=True)]
