"""`harness run`: methods x budgets on tasks, then their board."""

import argparse
from collections.abc import Sequence
from typing import Any

from harness.boards.sources import asked_of, collect, read_config
from harness.cli.arguments import RESULTS, names, numbers, place, threads, whole
from harness.cli.ray import fan_out, ray_options
from harness.plan.names import check_sweep, sweep_of
from harness.records.atomic_files import check_place


def run_parser(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("--config", help="a TOML file with these options as keys, or the name of a packaged board (quick)")
    add("--model", help="smollm2-135m (default), tiny, a hub id, a folder or a .gguf file")
    add("--methods", type=names, help="comma-separated, `name` or `name@preset`; see `harness list methods`")
    add("--tasks", type=names, help="comma-separated tasks or families; see `harness list tasks`")
    add("--budgets", type=names, help="tokens per layer and KV head (128), or kept fractions (0.25, 25%%)")
    add("--lengths", type=numbers, help="context lengths in tokens of generated tasks")
    add("--limit", type=whole, help="samples per task, or per task and length for generated tasks")
    add("--seed", type=whole)
    add("--max-tokens", type=whole, help="prompt and generation together (default: the model's context)")
    add("--max-new-tokens", type=whole, help="cap on the tasks' own generation lengths; recorded")
    add("--first-token", choices=("compressed", "prefill"), help="where the first generated token comes from")
    add("--query", choices=("aware", "agnostic"), help="whether compression sees the question")
    add("--nll-tokens", type=whole, help="reference tokens scored at most; 0 turns answer NLL off")
    add("--observe", type=whole, metavar="N", help="prompts per length or data set on which it is timed; 0: none")
    add("--dtype", help="auto (default), float32, bfloat16 or float16")
    add("--device", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--trust-remote-code", action="store_true", default=None, help="run code that a hub repository brings")
    add("--data-dir", help="folder with the files of LongBench and of RULER's qa tasks")
    add("--whole", action="store_true", default=None, help="only LongBench rows that fit without being cut")
    add("--contexts", choices=("drawn", "protocol"), help="a text for each prompt (default), or fixed haystacks")
    add("--graded", metavar="FILE", help="settings of graded tasks, from `harness calibrate-tasks` (default: packaged)")
    add("--receiver", metavar="MODEL", help="another model that answers relay tasks, of the same cache shape")
    add("--receiver-map", metavar="DIR", help="what `harness calibrate-relay` found between the two")
    add("--set", action="append", metavar="METHOD.PARAM=VALUE", help="change a parameter of a method; repeatable")
    add("--measure", action="store_true", default=None, help="time every cell by itself too, and its peak memory")
    add("--out", type=place, default=RESULTS, help="folder of run folders (default: results)")
    add("--threads", type=threads, help="CPU threads (default: PyTorch's choice, within the container's)")
    add("--resume-anyway", action="store_true", help="go on with a run of other code, packages or another machine")
    add("--html", action="store_true", help="write the board as board.html too")
    ray_options(run)
    run.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    options: dict[str, Any] = {} if args.config is None else read_config(args.config)
    options.pop("nightly", None)  # what `harness nightly` adds to the same board
    board = options.pop("board", {})
    sweep = sweep_of(args, options)
    check_place(args.out)
    check_sweep(sweep)
    asked = asked_of(board, sweep, typed=args.methods is not None).model_copy(update={"html": args.html})
    fan = fan_out(args)
    if fan is not None:
        from harness.run.driver import run_fanout

        folder = run_fanout(sweep, fan, root=args.out, command=command, resume_anyway=args.resume_anyway)
    else:
        from harness.machine import set_threads
        from harness.run.sequential import run_sweep

        set_threads(args.threads)
        folder = run_sweep(sweep, root=args.out, command=command, resume_anyway=args.resume_anyway)
    from harness.boards.show import show

    return show(collect([folder], whole=args.html), out=folder, name="board", asked=asked)
