"""`harness calibrate-tasks` on the command line."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import names, numbers, place, threads, whole
from harness.cli.compile import calibration_spec
from harness.machine import set_threads
from tasks.graded.settings import Graded


def calibrate_tasks_parser(calibrating: argparse.ArgumentParser) -> None:
    add = calibrating.add_argument
    add("--model", help="as in `harness run`")
    add("--tasks", type=names, help="graded tasks, instructions/obey (default: all)")
    add("--lengths", type=numbers, metavar="A,B", help="context lengths in tokens (1024,2048)")
    add("--samples", type=whole, help="prompts that a chosen setting is measured on (24); half of them while searching")
    add("--seed", type=whole, help="of the prompts (1000)")
    add("--out", type=place, required=True, metavar="DIR", help="folder for scores and the result; repeat to resume")
    add("--dtype", help="as in `harness run`")
    add("--device", help="as in `harness run`")
    add("--threads", type=threads, help="CPU threads (default: PyTorch's choice)")
    calibrating.set_defaults(action=_calibrate)


def _calibrate(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.compiler.asked import GradeSpec
    from harness.plan.names import plan_tasks
    from harness.records.spec import Sweep

    spec = calibration_spec(GradeSpec, args)
    plan_tasks(Sweep(methods=("fullkv",), tasks=spec.tasks))  # refuses an unknown one before torch is imported

    from harness.compiler.grade import Grader

    set_threads(args.threads)
    grader = Grader(spec, args.out)
    found: list[Graded] = []
    chosen: dict[str, int | None] = {}  # of each task at the length before
    for length in grader.spec.lengths:
        for task in grader.tasks:
            graded = grader.grade(task, length, chosen.get(task.name))
            chosen[task.name] = graded.chosen
            found.append(graded)
            print(f"{task.name} at {length}: {_shown(graded)}", flush=True)
    rules = grader.rules()
    for rule in rules:
        print(f"rule {rule.rule}: kept by the full cache in {rule.score:.1f} +- {rule.error:.1f} % of {rule.n} prompts")
    path = grader.write(found, rules, command)
    print(f"{sum(one.chosen is not None for one in found)} of {len(found)} settings qualify; wrote {path}")
    print(f"use it with --graded {path}")
    return 0


def _shown(graded: Graded) -> str:
    """What was chosen, or all that was tried."""
    tried = {one.setting: one for one in graded.tried}
    if graded.chosen is None:
        return f"no {graded.dial} qualifies: " + ", ".join(f"{one.setting} {one.score:.0f}" for one in graded.tried)
    chosen = tried[graded.chosen]
    return f"{graded.dial} {chosen.setting}, full cache {chosen.score:.1f} +- {chosen.error:.1f} on {chosen.n} prompts"
