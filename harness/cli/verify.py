"""`harness verify`: score a submitted run again and check it."""

import argparse
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cli.arguments import place, whole
from harness.errors import HarnessError
from harness.models.source import KNOWN, check_scored
from harness.records.plain_files import of_json
from harness.records.record import RunManifest


def verify_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pack", type=place, metavar="PACK", help="archive that `harness submit` wrote")
    add("--partial", action="store_true", help="missing cells are no fault")
    add("--tokenizer", metavar="MODEL", help="the run's model: make its prompts again, and decode the stored tokens")
    add("--data-dir", type=place, metavar="DIR", help="where the tasks' data is, for --tokenizer and --rescore")
    add("--rescore", action="store_true", help="run a tenth of the cells again, with the model of --tokenizer")
    add("--rescore-seed", type=whole, metavar="N", help="which tenth; drawn anew, and told, when not given")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.submission.verify import verify_pack

    model = args.tokenizer or (_packaged(args.pack) if args.rescore else None)
    options = {} if model is None else _with_model(model, args)
    verdict = verify_pack(args.pack, partial=args.partial, **options)
    print("\n".join(verdict.told()))
    if model is None and verdict.ok:
        print(
            "prompts and references are as reported; --tokenizer MODEL makes them again, --rescore runs a tenth again"
        )
    return 0 if verdict.ok else 1


def _packaged(path: Path) -> str:
    """The run's model where it comes with the harness. Others are named: an archive loads nothing of its choice."""
    from harness.submission.archive import MANIFEST, open_pack

    with open_pack(path) as pack:
        name = of_json(RunManifest, pack.read(MANIFEST), where=MANIFEST, remedy="pack the run again").spec.model.name
    if name not in KNOWN:
        raise HarnessError(f"the run is of model {name!r}; name it with --tokenizer to run cells again")
    return name


def _with_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `verify_pack` does with a model: its weights are read for --rescore alone."""
    from harness.models.load import describe_model, load_model
    from harness.models.prompt import TaskTokenizer
    from harness.submission.check_again import Again
    from harness.submission.check_prompts import draw_again

    check_scored(name)
    known = describe_model(name, dtype="float32", device="cpu")
    options: dict[str, Any] = {"decode": TaskTokenizer(known.tokenizer).decode}
    options["draw"] = lambda manifest: draw_again(manifest, known, data_dir=args.data_dir)
    if args.rescore:
        seed = secrets.randbelow(1 << 31) if args.rescore_seed is None else args.rescore_seed
        options["again"] = lambda manifest, drawn: Again(
            manifest, drawn, lambda: load_model(name, dtype=manifest.spec.model.dtype), seed=seed
        )
    return options
