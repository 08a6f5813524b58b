"""`harness compile` on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import names, numbers
from harness.errors import HarnessError, checked


def compile_parser(compiling: argparse.ArgumentParser) -> None:
    add = compiling.add_argument
    add("--model", help="as in `harness run`")
    add("--corpus", dest="corpora", type=names, metavar="C", help="kjv, pydoc, essays or folders of text, by commas")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for roll-outs and tables; repeat to resume")
    add("--prompts", type=int, help="calibration prompts, over all corpora (128)")
    add("--lengths", type=numbers, metavar="A,B", help="tokens of a prompt, least and most (600,1000)")
    add("--budgets", type=numbers, help="budgets that tables are compiled for (64,128,256,512)")
    add("--form", help="tables whose score form is taken over, to compare tables of two corpora (default: choose one)")
    add("--steps", type=int, help="gradient steps, one prompt each (160)")
    add("--estimator", choices=("gradient", "ridge"), help="of the slot budgets (gradient)")
    add("--published", action="store_true", default=None, help="compile the published form's tables too, by Q-learning")
    add("--seed", type=int)
    add("--dtype", help="as in `harness run`")
    add("--device", help="as in `harness run`")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    compiling.set_defaults(action=_compile)


def _compile(args: argparse.Namespace, command: Sequence[str]) -> int:
    import torch

    from harness.compiler.compile import Compiler
    from harness.compiler.stage import CompileSpec
    from methods.base import PolicyError

    given = {name: getattr(args, name) for name in CompileSpec.model_fields if getattr(args, name, None) is not None}
    spec = checked(CompileSpec, given)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        manifest = Compiler(spec, args.out).compile(command).manifest
    except PolicyError as error:
        raise HarnessError(str(error)) from None
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
