"""`harness lm-eval ...`: lm-eval's own command line with one model more, `kvpolicy`; what follows the verb is its."""

import argparse
from collections.abc import Sequence


def lm_eval_parser(parser: argparse.ArgumentParser) -> None:
    """Takes everything after the verb as it is, `--help` too. Make `parser` with add_help=False."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.lm_eval.command_line import run_lm_eval

    return run_lm_eval(args.arguments)
