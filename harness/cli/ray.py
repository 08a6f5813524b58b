"""Options of `harness run` that fan it out over Ray."""

import argparse
from importlib.util import find_spec

from pydantic import ValidationError

from harness.cli.arguments import real, whole
from harness.errors import HarnessError, shown
from harness.run.fan import FanOut

OPTIONS = {
    **{"workers": "workers", "cpus_per_worker": "cpus", "gpus_per_worker": "gpus", "autoscale": "autoscale"},
    **{"item_timeout": "timeout_s", "tries": "tries", "start_timeout": "start_s"},
}  # as typed, to the fields of `FanOut`


def ray_options(run: argparse.ArgumentParser) -> None:
    """Add them. The run itself, its id and its records are the same with and without."""
    add = run.add_argument_group("many workers", "the same run fanned out over a Ray cluster").add_argument
    ray = "auto (a cluster on this machine, or one of its own), local, host:port, ray://host:port"
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help=ray)
    add("--workers", type=whole, help="how many (default: as many as fit into the cluster)")
    add("--cpus-per-worker", type=real, help="CPU slots, and CPU threads, of a worker (default: 1)")
    add("--gpus-per-worker", type=real, help="GPUs of a worker (default: 1 where there are any); more share a model")
    add("--autoscale", action="store_true", default=None, help="nodes for --workers will be added to the cluster")
    add("--item-timeout", type=real, metavar="S", help="seconds of a sample after which its worker hangs (3600)")
    add("--tries", type=whole, help="until a sample that kills its workers is marked failed (default: 3)")
    add("--start-timeout", type=real, metavar="S", help="seconds without any worker until the run ends (900)")


def fan_out(args: argparse.Namespace) -> FanOut | None:
    """How the run is fanned out, None for a run in this process. Raises HarnessError for unusable options."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.ray is None:
        if given:
            raise HarnessError(f"--{next(iter(given)).replace('_', '-')} is for runs on a Ray cluster; add --ray")
        return None
    if args.threads is not None:
        raise HarnessError(f"--threads {shown(args.threads)} is of this process; give --cpus-per-worker with --ray")
    try:
        fan = FanOut(address=args.ray, **{OPTIONS[name]: value for name, value in given.items()})
    except ValidationError as error:
        raise _refusal(error) from None
    if find_spec("ray") is None:
        raise HarnessError("--ray needs Ray; install it with `pip install 'kv-policy-harness[ray]'`")
    return fan


def _refusal(error: ValidationError) -> HarnessError:
    """The first option that is out of range, as it is typed."""
    first = error.errors()[0]
    name = next(name for name, field in OPTIONS.items() if field == first["loc"][0]).replace("_", "-")
    why = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"].lower()
    given = first["input"]
    seen = f"{given:g}" if isinstance(given, float) else shown(given)
    return HarnessError(f"--{name} {seen} is out of range; {why}")
