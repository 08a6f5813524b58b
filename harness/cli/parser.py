"""The command line, `harness COMMAND`; `harness --help` lists the commands.

Bad input, or a system that refuses a file, ends with one line on stderr and exit code 2, an interrupt with 130, SIGTERM
with 143 and SIGHUP with 129; what is already recorded stays. A command's module is imported once it is called: names
and help lines of all of them are here.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from harness import __version__
from harness.cli.arguments import Parser, check_words
from harness.cli.terminal import fit_streams
from harness.errors import HarnessError, line_of, shown
from harness.stopping import Stopped, stopping
from methods.budget import PolicyError
from tasks.base import TaskError

COMMANDS = {
    "run": "run methods x budgets on tasks, then print the board",
    "board": "board of stored runs, from their records alone",
    "compare": "what differs between two runs, row by row, with intervals",
    "claims": "published claims, a verdict each, and the command that checks it",
    "list": "what can be named on the command line",
    "fetch": "download a packaged asset into the cache, to work offline later",
    "compile": "compile CompilerKV's tables from roll-outs of a model",
    "tune": "choose a method's parameters on calibration prompts, for NAME@tuned",
    "calibrate-tasks": "find the difficulty of graded tasks that suits a model",
    "calibrate-relay": "measure what one model needs to answer from another's cache",
    "tables": "look at compiled tables, compare and move them",
    "bench": "speed and memory of methods, each by itself",
    "serve-bench": "speed and memory of a batch of prompts decoded together",
    "boundary": "largest context and batch that fit a memory limit",
    "status": "how runs are getting on",
    "submit": "pack a run as an archive that others can verify",
    "verify": "score a submitted run again and check it",
    "export": "records as Parquet, results as a model card",
    "nightly": "run a board and compare it with the last published night",
    "simulate": "how long a sweep would take on a cluster, from a recorded run",
    "lm-eval": "lm-eval's own command line, with the model kvpolicy",
    "lm-eval-import": "results of lm-eval as runs of this store",
    "new-method": "write a method, its golden test and its lines of docs",
    "data": "data sets of tasks: `harness data fetch longbench`",
}
"""Help line by command. The options of `new-method` are those of `new_method_parser` in harness/cli/new_method.py."""
PASSED_ON: dict[str, Any] = {"add_help": False, "prefix_chars": "\0"}
"""Of a command that takes everything behind its name as it is, `--help` too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 some cells failed, 2 bad input, 130 interrupted.

    SIGTERM ends it with 143 and SIGHUP with 129, as an interrupt does. `harness nightly` has a code of its own
    besides, 3: a new series.
    """
    fit_streams()
    logging.basicConfig(format="harness: %(message)s", level=logging.WARNING)
    words = sys.argv[1:] if argv is None else argv
    try:
        check_words(words)
        args = command_line().parse_args(words)
        action: Callable[[argparse.Namespace, Sequence[str]], int] = args.action
        with stopping():
            code = action(args, ("harness", *words))
        sys.stdout.flush()  # a full disk is told here, not by the interpreter as it ends
        return code
    except (HarnessError, PolicyError, TaskError) as error:
        print(f"harness: {line_of(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        told = f" by {stop}" if isinstance(stop, Stopped) else ""
        print(f"harness: interrupted{told}; what is recorded stays, repeat the command to go on", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Stopped) else 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno is None:  # no word of the system: a bug, or a library's own
            raise
        where = "the output" if error.filename is None else shown(str(error.filename))
        print(f"harness: {where}: {error.strerror}; make room or choose another place", file=sys.stderr)
        return 2


class _Command(Parser):
    """A command by name, which gets its options when it is the one that is parsed."""

    def __init__(self, *, command: str, **options: Any) -> None:
        super().__init__(**options)
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        stem = self._command.replace("-", "_")
        add_options: Callable[[Parser], None] = getattr(import_module(f"harness.cli.{stem}"), f"{stem}_parser")
        add_options(self)
        return super().parse_known_args(args, namespace)


def command_line() -> argparse.ArgumentParser:
    """The parser of every command. It serves one command line."""
    parser = Parser(prog="harness", description="Compare KV-cache compression methods at the same measured bytes.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, command=name, **(PASSED_ON if name == "lm-eval" else {}))
    return parser


if __name__ == "__main__":
    sys.exit(main())
