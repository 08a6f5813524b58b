"""`harness calibrate-relay` on the command line."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import names, numbers, place, threads, whole
from harness.cli.compile import calibration_spec
from harness.machine import set_threads


def calibrate_relay_parser(calibrating: argparse.ArgumentParser) -> None:
    add = calibrating.add_argument
    add("--model", help="that sends, as in `harness run`")
    add("--receiver", help="that answers; its cache has the same shape")
    add("--corpus", dest="corpora", type=names, metavar="C", help="kjv, pydoc, essays, awsdocs or folders, by commas")
    add("--prompts", type=whole, help="calibration prompts, over all corpora (50)")
    add("--lengths", type=numbers, metavar="A,B", help="tokens of a prompt, least and most (600,1000)")
    add("--seed", type=whole)
    add("--out", type=place, required=True, metavar="DIR", help="folder for what was calibrated")
    add("--dtype", help="as in `harness run`")
    add("--device", help="as in `harness run`")
    add("--threads", type=threads, help="CPU threads (default: PyTorch's choice)")
    calibrating.set_defaults(action=_calibrate)


def _calibrate(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.compiler.asked import RelaySpec

    spec = calibration_spec(RelaySpec, args)

    from harness.compiler.relay import calibrate_relay

    set_threads(args.threads)
    found = calibrate_relay(spec, args.out, command)
    print(f"{found.prompts} prompts of {found.tokens} tokens, {found.seconds:.0f} s; wrote {args.out}")
    print(f"use it with --tasks relay --receiver {spec.receiver} --receiver-map {args.out}")
    return 0
