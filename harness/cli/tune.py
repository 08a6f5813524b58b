"""`harness tune` on the command line."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import names, whole
from harness.cli.compile import add_calibration, calibration_spec
from harness.machine import set_threads


def tune_parser(tuning: argparse.ArgumentParser) -> None:
    tuning.add_argument("methods", type=names, metavar="METHOD", help="methods that state choices, by commas")
    tuning.add_argument("--trials", type=whole, help="sets of parameters of each (as many as CompilerKV's form had)")
    add_calibration(tuning)
    tuning.set_defaults(action=_tune)


def _tune(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.compiler.asked import TuneSpec

    spec = calibration_spec(TuneSpec, args)

    from harness.compiler.tune import Tuner

    set_threads(args.threads)
    tuner = Tuner(spec, args.out)
    for method in tuner.methods:
        tuning, path = tuner.tune(method, command)
        shown = ", ".join(f"{name}={value}" for name, value in tuning.chosen.items())
        first, best = tuning.trials[0], min(tuning.trials, key=lambda trial: trial.score)
        print(f"{method}: {shown}")
        for budget, plain, own in zip(tuning.budgets, first.divergence, best.divergence, strict=True):
            print(f"budget {budget}: divergence {plain:.4f} with defaults, {own:.4f} tuned, nats a token")
        often, left_out = tuning.left_out["often"], tuning.left_out["ratio"]
        print(f"{len(tuning.trials)} of {tuning.space} sets; {often:.0%} of folds agree, left-out score {left_out:.3f}")
        print(f"wrote {path}; use it with --methods {method}@tuned --set {method}.artefact={path.parent}")
    return 0
