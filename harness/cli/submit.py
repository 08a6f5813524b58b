"""`harness submit`: pack a run as an archive that others can verify."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import place
from harness.errors import HarnessError


def submit_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=place, metavar="RUN", help="run folder, or a folder that holds one")
    add("--out", type=place, metavar="PACK", help="archive to write, or folder for RUN_ID.zip (here)")
    add("--partial", action="store_true", help="pack a run that is not finished")
    add("--no-references", action="store_true", help="leave the references out, where data must not be handed on")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
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
