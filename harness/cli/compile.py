"""`harness compile` on the command line."""

import argparse
from collections.abc import Sequence
from typing import TypeVar

from harness.cli.arguments import names, numbers, place, threads, whole
from harness.errors import checked
from harness.machine import set_threads
from harness.records.spec import Frozen

Spec = TypeVar("Spec", bound=Frozen)


def compile_parser(compiling: argparse.ArgumentParser) -> None:
    add_calibration(compiling)
    add = compiling.add_argument
    add("--form", help="tables whose score form is taken over, to compare tables of two corpora (default: choose one)")
    add("--steps", type=whole, help="gradient steps, one prompt each (160)")
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
