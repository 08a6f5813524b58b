"""A run as it is handed in, small and true: made records whose scores and bytes follow from what they say."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from harness.records.record import Record, RunManifest
from harness.records.run_folder import RunStore
from harness.records.spec import MethodSpec, TaskSpec
from harness.submission.archive import INDEX, RECORDS, Index, PackedFile, zipped
from tasks import load_tasks
from tasks.base import Sample
from tests import pretend

TOKENS, LAYERS, HEADS, SLOT = 100, 4, 2, 128
METHODS = (
    MethodSpec(label="fullkv", name="fullkv", budgeted=False),
    MethodSpec(label="snapkv", name="snapkv"),
    MethodSpec(label="h2o", name="h2o"),
)


def manifest(**changes: Any) -> RunManifest:
    """Of a finished run of 3 samples x 5 cells of niah/passkey. Fields of the spec go there."""
    run = {"tasks": (TaskSpec(name="niah/passkey", protocol="passkey"),), "methods": METHODS, "budgets": ("16", "0.5")}
    run |= {"limit": 3, "command": ("harness", "run"), "started": "2026-01-01T00:00:00+00:00"}
    return pretend.manifest(**{**run, "samples": 3, "cells": 5, "git_commit": "c0ffee", **changes})


def record(number: int, method: str, budget: str, **changes: Any) -> Record:
    """A cell of sample `number`; every other prediction is right."""
    answer, kept = f"{7000 + number}", {"full": TOKENS, "16": 16, "0.5": 50}[budget]
    prediction = f"the key is {answer}" if (number + kept) % 2 else "I cannot tell"
    meta = {"length": 1024, "depth": 10 * number, "needles": [f"The key is {answer}."]}
    size, position = HEADS * LAYERS * SLOT, 0 if budget == "full" else HEADS * LAYERS * 4
    held = kept * (size + position)
    values: dict[str, Any] = {
        **{"run_id": manifest().run_id, "task": "niah/passkey", "prompt_sha256": f"{number:064x}"},
        **{"prompt_tokens": TOKENS, "compressed_tokens": TOKENS, "budget_tokens": None if budget == "full" else kept},
        **{"kept_slots": (kept * HEADS,) * LAYERS, "kv_bytes": held, "kv_bytes_end": held + size},
        **{"stored_bytes": held, "stored_bytes_end": held + 4 * size},
        **{"asked_bytes": held, "full_bytes": TOKENS * size, "answers": (answer,), "prediction": prediction},
        **{"token_ids": (1, 2, 3), "nll": 2.0, "nll_tokens": 4, "nll_first": 3.0, "meta": meta, **changes},
    }
    name = changes.get("sample_id", f"1024/depth{number}/0")
    sample = Sample(name, "", "", tuple(values["answers"]), 8, meta=values["meta"])
    score = load_tasks()[values["task"]].score(sample, values["prediction"])
    return pretend.record(method, budget, name, 0.0, **{"metrics": dict(score), **values})


def records() -> list[Record]:
    """All of the run, sample by sample."""
    cells = [("fullkv", "full"), *((name, budget) for name in ("snapkv", "h2o") for budget in ("16", "0.5"))]
    return [record(number, *cell) for number in range(3) for cell in cells]


def stored(root: Path, run: RunManifest | None = None, own: list[Record] | None = None) -> Path:
    """The run's folder below `root`."""
    with RunStore(root, run or manifest()) as store:
        store.append(records() if own is None else own)
        return store.folder


def members_of(pack: Path) -> dict[str, bytes]:
    with ZipFile(pack) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repacked(pack: Path, members: Mapping[str, bytes], **changes: Any) -> Path:
    """Write other members with an index that fits them, as one who cheats with care would."""
    kept = {name: data for name, data in members.items() if name != INDEX}
    files = tuple(
        PackedFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in kept.items()
    )
    values = {"run_id": manifest().run_id, "files": files, **changes}
    pack.write_bytes(zipped({INDEX: Index(**values).model_dump_json().encode(), **kept}))
    return pack


def forged(pack: Path, change: Callable[[list[dict[str, Any]]], None], **changes: Any) -> Path:
    """The archive after `change` had its way with the parsed records, with checksums that fit."""
    members = members_of(pack)
    lines = [json.loads(line) for line in members[RECORDS].splitlines()]
    change(lines)
    members[RECORDS] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return repacked(pack, members, **changes)
