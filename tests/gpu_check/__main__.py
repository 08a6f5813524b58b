"""One prepared check of a CUDA card, in at most eight minutes: `make gpu-check`, docs/gpu.md.

python -m tests.gpu_check --out build/gpu-check        measure, then print the report
python -m tests.gpu_check --out build/gpu-check --report
python -m tests.gpu_check --out build/rehearsal --rehearse
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # or gaps between blocks would count
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from harness.errors import HarnessError
from tests.gpu_check import ceilings, decoding, equality, probes, speed
from tests.gpu_check.card import Card, NoCard
from tests.gpu_check.report import files_of, report
from tests.gpu_check.step import FULL, REHEARSAL, Check, Step

SECONDS = 460.0
STEPS = (
    Step("0-ceilings", 20, ceilings.ceilings),
    Step("1-tests", 105, ceilings.own_tests),
    Step("2-kernels-equal", 60, equality.kernels),
    Step("3-methods-equal", 60, equality.every_method),
    Step("4-whole-prompts", 40, speed.whole_prompts),
    Step("5-streams", 30, speed.streams),
    Step("6-prompts", 110, probes.prompts),
    Step("7-decoding", 80, decoding.decoding),
    Step("8-boundary", 80, probes.boundary),
    Step("9-batches", 80, probes.batches),
    Step("10-second-model", 80, probes.second_model),
)
"""In order of value; their limits are more than there is time, so that what one leaves is another's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check or print what one found; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder of the results (a new one in build)")
    add("--seconds", type=float, default=SECONDS, help=f"for all steps ({SECONDS:.0f})")
    add("--shape", help="of the model, as in `--model shape:NAME` (llama-3-8b)")
    add("--rehearse", action="store_true", help="every step once, small, on the CPU; it measures nothing")
    add("--report", action="store_true", help="print what is in --out and measure nothing")
    add("--after", choices=[step.name for step in STEPS], help="leave out the steps up to this one")
    asked = parser.parse_args(arguments)
    try:
        if not asked.report:
            asked.out = _place(asked)
            _run(asked)
        elif asked.out is None:
            raise HarnessError("--report is of a folder; give --out")
        print(report(asked.out))
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _place(asked: argparse.Namespace) -> Path:
    """Where results go. Raises HarnessError without a card to measure, and for a folder that has results already."""
    if not asked.rehearse and not torch.cuda.is_available():
        raise HarnessError("no CUDA device here; give --rehearse to try the steps on the CPU")
    kind, at = "gpu-rehearsal" if asked.rehearse else "gpu-check", datetime.now().strftime("%Y%m%d-%H%M%S")
    out: Path = asked.out or Path("build") / kind / at
    if asked.after is None and files_of(out):
        raise HarnessError(f"{out} has results already, which would be mixed; choose another --out, or give --report")
    return out


def _run(asked: argparse.Namespace) -> None:
    size = REHEARSAL if asked.rehearse else FULL
    size = replace(size, model=f"shape:{asked.shape}") if asked.shape else size
    check = Check(NoCard() if asked.rehearse else Card(), size, asked.out, asked.seconds)
    names = [step.name for step in STEPS]
    gc.collect()
    gc.freeze()  # of what is imported nothing goes, and each `Card.free` need not look
    for step in STEPS[names.index(asked.after) + 1 if asked.after else 0 :]:
        status = check.run(step)
        print(f"{check.seconds - check.left_s():6.1f} s  {step.name}: {status}", file=sys.stderr, flush=True)
        if not check.card.alive():
            print("the card takes no more work from this process; another one goes on", file=sys.stderr, flush=True)
            again = ["--out", str(asked.out), "--seconds", str(check.left_s()), "--after", step.name]
            again += ["--shape", asked.shape] if asked.shape else []
            os.execv(sys.executable, [sys.executable, "-m", "tests.gpu_check", *again])


if __name__ == "__main__":
    sys.exit(main())
