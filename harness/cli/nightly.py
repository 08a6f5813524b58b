"""`harness nightly` on the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.cli.arguments import place, threads
from harness.cli.ray import fan_out, ray_options
from harness.errors import HarnessError, one_line
from leaderboards.nights.compare import NightlyOptions

NEW_SERIES = 3
"""Exit code of a night that was compared with none."""
EXITS = (
    "Ends with 0 when nothing regressed, 1 when something did (the night is not published), 2 for bad input, 3 when "
    "the night begins a new series: a new processor, dtype or torch, or the first night. Nothing was judged then; it "
    "is published, and the next night is compared with it."
)


def nightly_parser(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXITS
    add = parser.add_argument
    add("config", metavar="BOARD", help="a TOML file with a [nightly] table, or the name of a packaged board (nightly)")
    add("--out", type=place, default=Path("results/nightly"), help="folder of nights (default: results/nightly)")
    add("--baseline", type=place, help="folder of published nights (default: as in the [nightly] table)")
    add("--accept", action="store_true", help="publish this night whatever came out; ends with 0")
    add("--threads", type=threads, help="CPU threads (default: PyTorch's choice, within the container's)")
    add("--resume-anyway", action="store_true", help="go on with an unfinished night where a method's code changed")
    ray_options(parser)
    parser.set_defaults(action=_action, set=None, methods=None)


def nightly_options(table: Any, config: str) -> NightlyOptions:
    if table is None:
        raise HarnessError(f'{config} has no [nightly] table; add one with version = 1 and baseline = "FOLDER"')
    try:
        return TypeAdapter(dict[str, NightlyOptions]).validate_python({"nightly": table})["nightly"]
    except ValidationError as error:
        raise one_line(error) from None


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.boards.sources import asked_of, read_config
    from harness.plan.names import check_sweep, sweep_of

    table = read_config(args.config)
    options = nightly_options(table.pop("nightly", None), args.config)
    board = table.pop("board", {})
    sweep = sweep_of(args, table)
    check_sweep(sweep)
    asked = asked_of(board, sweep, typed=False)
    fan = fan_out(args)

    from harness.boards.nightly import Nightly, run_nightly
    from harness.machine import set_threads
    from leaderboards.nights.report import headline, to_terminal, warning

    if fan is None:
        set_threads(args.threads)
    ask = Nightly(
        board=Path(args.config).stem,
        sweep=sweep,
        options=options,
        baseline=args.baseline or Path(options.baseline),
        out=args.out,
        fan=fan,
        asked=asked,
        accept=args.accept,
        resume_anyway=args.resume_anyway,
    )
    verdict, written = run_nightly(ask, command=command)
    print(to_terminal(verdict))
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    if told := warning(verdict):
        print(f"harness: warning: {told}", file=sys.stderr)
    if verdict.publishable:
        return NEW_SERIES if told and not args.accept else 0
    name, place = verdict.night.about.name, written[-1].parent
    advice = f"if that is meant, repeat with --accept or copy {place}/{name}.* to {ask.baseline}"
    print(f"harness: {headline(verdict)}; the published night stays; {advice}", file=sys.stderr)
    return 1
