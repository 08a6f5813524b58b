"""`harness compile` on the command line."""

import argparse
import json
from collections.abc import Sequence
from typing import TypeVar

from harness.cli.arguments import names, numbers, place, threads, whole
from harness.errors import HarnessError, checked
from harness.machine import set_threads
from harness.records.spec import Frozen

Spec = TypeVar("Spec", bound=Frozen)
TABLES = "compilerkv"
OF_TABLES = ("form", "estimator", "published")


def compile_parser(compiling: argparse.ArgumentParser) -> None:
    add = compiling.add_argument
    add("method", nargs="?", default=TABLES, metavar="METHOD", help="whose constants to make (default: compilerkv)")
    add_calibration(compiling)
    add("--form", help="tables whose score form is taken over, to compare tables of two corpora (default: choose one)")
    add("--steps", type=whole, help="gradient steps, one prompt each (160 of compilerkv)")
    add("--estimator", choices=("gradient", "ridge"), help="of the slot budgets (gradient)")
    add("--published", action="store_true", default=None, help="compile the published form's tables too, by Q-learning")
    compiling.set_defaults(action=_compile)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that works on calibration prompts."""
    add = parser.add_argument
    add("--model", help="as in `harness run`")
    add(
        "--corpus",
        dest="corpora",
        type=names,
        metavar="C",
        help="kjv, pydoc, essays, awsdocs or folders, by commas",
    )
    add("--out", type=place, required=True, metavar="DIR", help="folder for roll-outs and results; repeat to resume")
    add("--prompts", type=whole, help="calibration prompts, over all corpora (128)")
    add("--families", type=names, metavar="F", help="kinds of prompts (all but repeated, records), by commas")
    add("--lengths", type=numbers, metavar="A,B", help="tokens of a prompt, least and most (600,1000)")
    add("--budgets", type=numbers, help="budgets that decide (64,128,256,512)")
    add("--seed", type=whole)
    add("--dtype", help="as in `harness run`")
    add("--device", help="as in `harness run`")
    add("--threads", type=threads, help="CPU threads (default: PyTorch's choice)")


def calibration_spec(kind: type[Spec], args: argparse.Namespace) -> Spec:
    """Return what was asked for. Raises HarnessError for a value out of range."""
    return checked(kind, {name: own for name in kind.model_fields if (own := getattr(args, name, None)) is not None})


def _compile(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.compiler.asked import CompileSpec

    if args.method != TABLES:
        return _compile_constants(args, command)
    spec = calibration_spec(CompileSpec, args)

    from harness.compiler.compile import Compiler

    set_threads(args.threads)
    manifest = Compiler(spec, args.out).compile(command).manifest
    print(f"form: {manifest.form}")
    print(f"halves agree at Spearman {manifest.report['halves_spearman']:.2f}")
    for budget, found in manifest.report["validation"].items():
        gain = found["over_shuffled"]
        print(
            f"budget {budget}: divergence {found['uniform']:.4f} uniform, {found['table']:.4f} compiled, "
            f"{found['shuffled']:.4f} shuffled; gain {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        )
    for name, reason in manifest.neutral.items():
        print(f"{name} left neutral: {reason}")
    print(f"wrote {args.out}; use it with --methods compilerkv --set compilerkv.tables={args.out}")
    return 0


def _compile_constants(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Make the constants of another method than compilerkv."""
    from harness.compiler.asked import ConstantsSpec
    from harness.compiler.constants import compile_method, compiler_of

    given = next((name for name in OF_TABLES if getattr(args, name) is not None), None)
    if given is not None:
        raise HarnessError(f"--{given} is an option of `harness compile {TABLES}`, not of {args.method}; leave it out")
    compiler_of(args.method)
    spec = calibration_spec(ConstantsSpec, args)
    set_threads(args.threads)
    manifest = compile_method(spec, args.out, command).manifest
    print(json.dumps(manifest.report, indent=2))
    print(f"{manifest.seconds:.0f} s")
    print(f"wrote {args.out}; use it with --methods {args.method} --set {args.method}.compiled={args.out}")
    return 0
