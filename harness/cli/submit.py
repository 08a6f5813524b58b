"""`harness submit | verify | export`: hand in a run, check one that was handed in, take records elsewhere."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.submission.verify import Decode, Verification

RESULTS = Path("results")


def submit_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `harness submit`."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, or a folder that holds one")
    add("--out", type=Path, metavar="PACK", help="archive to write, or folder for RUN_ID.zip (here)")
    add("--partial", action="store_true", help="pack a run that is not finished")
    add("--no-references", action="store_true", help="leave the references out, where data must not be handed on")
    parser.set_defaults(action=_submit)


def verify_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `harness verify`."""
    add = parser.add_argument
    add("pack", type=Path, metavar="PACK", help="archive that `harness submit` wrote")
    add("--partial", action="store_true", help="missing cells are no fault")
    add("--tokenizer", metavar="MODEL", help="decode the stored tokens too, with this model's tokenizer")
    parser.set_defaults(action=_verify)


def export_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `harness export`."""
    add = parser.add_argument
    add("run", type=Path, nargs="?", default=RESULTS, metavar="RUN", help="run folder, or a folder of them (results)")
    add("--parquet", type=Path, metavar="FILE", help="one row per record")
    add("--card", type=Path, metavar="FILE", help="results for a Hugging Face model card; JSON or YAML by its name")
    parser.set_defaults(action=_export)


def _submit(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.records.run_folder import find_runs
    from harness.submission.archive import pack_run

    folders = find_runs(args.run)
    if len(folders) > 1:
        raise HarnessError(f"{args.run} holds {len(folders)} runs; name one, such as {folders[0]}")
    out = args.out or Path()
    if out.is_dir():
        out /= f"{folders[0].resolve().name}.zip"
    index = pack_run(folders[0], out, partial=args.partial, references=not args.no_references)
    for file in index.files:
        print(f"{file.name:<14} {file.size:>12,} bytes  {file.sha256[:12]}")
    data = out.read_bytes()
    print(f"wrote {out}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


def _verify(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.submission.verify import verify_pack

    verdict = verify_pack(args.pack, partial=args.partial, decode=_decoder(args.tokenizer))
    print("\n".join(told(verdict)))
    return 0 if verdict.ok else 1


def _decoder(model: str | None) -> Decode | None:
    if model is None:
        return None
    from harness.models.load import describe_model
    from harness.models.prompt import TaskTokenizer

    return TaskTokenizer(describe_model(model, dtype="float32", device="cpu").tokenizer).decode


def told(verdict: Verification) -> list[str]:
    """The verdict in lines: what it is of, a table of checks, what was not recomputed, OK or REFUSED with reasons."""
    lines = []
    if verdict.manifest is not None:
        m = verdict.manifest
        what = f"{m.spec.model.name} {m.spec.model.dtype}, {m.samples} samples x {m.cells} cells, commit {m.git_commit}"
        lines.append(ascii(f"run {m.run_id}: {what}, packed by version {verdict.index.harness}")[1:-1])
    lines.append(f"{'check':<12} {'counted':>9} {'refused':>9}")
    for check in verdict.checks:
        note = "  values reported, not recomputed" if check.name == "likelihood" else ""
        lines.append(f"{check.name:<12} {check.counted:>9,} {check.refused:>9,}{note}")
    others = [f"{count} {status}" for status, count in sorted(verdict.statuses.items()) if status != "ok"]
    if others:
        lines.append(f"without a score: {', '.join(others)}")
    if verdict.ok:
        part = " Cells may be missing: it is a part of a run." if verdict.index.partial else ""
        lines.append(f"OK: the scores follow from the predictions. Seconds and NLL are as reported.{part}")
    else:
        lines += ["REFUSED", *(f"  {reason}" for reason in verdict.reasons)]
    return lines


def _export(args: argparse.Namespace, command: Sequence[str]) -> int:
    from leaderboards.tables.frame import load, to_parquet, write_card

    if args.parquet is None and args.card is None:
        raise HarnessError("nothing to write; add --parquet FILE or --card FILE")
    frame = load(args.run)
    if args.parquet is not None:
        to_parquet(frame, args.parquet)
        print(f"wrote {args.parquet}: {len(frame):,} rows, {len(frame.columns)} columns")
    if args.card is not None:
        print(f"wrote {args.card}: {write_card(frame, args.card)} results")
    return 0
