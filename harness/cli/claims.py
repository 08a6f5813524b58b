"""`harness claims`: published claims, a verdict each, and the command that checks it."""

import argparse
from collections.abc import Sequence


def claims_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("ids", nargs="*", metavar="ID", help="claims to show in whole (default: all, one line each)")
    add("--paper", help="only those of a method (snapkv) or paper (2404.14469)")
    form = parser.add_mutually_exclusive_group().add_argument
    form("--json", action="store_true", help="print the data, the verdicts and what was found as JSON")
    form("--markdown", action="store_true", help="print docs/claims.md")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.claims.claim import choose, load_claims

    chosen = choose(load_claims(), args.ids, args.paper)  # before torch is imported

    from harness.claims.tables import to_json, to_markdown, to_terminal
    from harness.claims.verdict import judge

    verdicts = list(judge(chosen))
    if args.markdown:
        print(to_markdown(verdicts))
    else:
        print(to_json(verdicts) if args.json else to_terminal(verdicts, whole=bool(args.ids)))
    return 0
