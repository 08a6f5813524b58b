"""`harness simulate`: how long a sweep would take on a cluster, from a run that was recorded."""

import argparse
import sys
import time
from collections.abc import Sequence

from harness.cli.arguments import names, numbers, place, real, whole
from harness.errors import checked


def simulate_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=place, metavar="RUN_FOLDER", help="a run folder; its seconds are what is simulated")
    add("--nodes", type=whole, default=1, help="of the cluster (1)")
    add("--gpus", type=whole, default=1, help="of each node, one worker each (1)")
    tasks = "longbench, ruler: the official samples, in fitted seconds (both); recorded: the items of the run itself"
    add("--tasks", type=names, default=("longbench", "ruler"), help=tasks)
    add("--lengths", type=numbers, help="RULER's lengths in tokens (4096,8192,...,131072)")
    add("--max-tokens", type=whole, default=131072, help="prompt and generation together (131072)")
    speedup = "recorded seconds over those of the model and device planned for (1)"
    add("--speedup", type=real, default=1.0, help=speedup)
    add("--start-seconds", type=real, default=60.0, help="from a worker's start until its model is loaded (60)")
    add("--mtbf-hours", type=real, help="mean hours between losses of a node (default: none is lost)")
    add("--node-seconds", type=real, default=0.0, help="until there is another node for a lost one (0)")
    add("--cost", action="append", metavar="NAME=SECONDS", help="change what something costs the driver; repeatable")
    add("--seed", type=whole, default=42, help="of drawn lengths, fit residuals and node losses (42)")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.simulate.asked import SimulationAsk, cluster_lines, costs_of, outcomes_of, plan_work, warnings
    from harness.simulate.simulate import saturation, table

    ask = checked(SimulationAsk, {name: getattr(args, name) for name in SimulationAsk.model_fields})
    costs = costs_of(args.cost or ())
    work, lines = plan_work(ask, args.run)
    print("\n".join(lines))
    print("\n".join(cluster_lines(ask, costs)), end="\n\n", flush=True)
    start = time.process_time()
    outcomes = outcomes_of(ask, work, costs)
    print(table(outcomes), end="\n\n")
    print(saturation(outcomes))
    for line in warnings(outcomes):
        print(line)
    print(f"simulated in {time.process_time() - start:.1f} s of CPU time", file=sys.stderr)
    return 0
